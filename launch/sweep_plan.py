"""Which jobs a sweep has: one per combination, composed and checked before the first starts."""

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.compose import Combination, combinations
from launch.exit_codes import FINISHED
from launch.traces import read_records
from launch.train import bind_with_launch, read_request, settled

if TYPE_CHECKING:
    from trainer.best import BestSpec

LOCAL = "launch.local.LocalSpec"
MAX_NAME = 80  # characters; a run's name may have 100, and NAME-2 is a name too
# Of no weight for the numbers of a job that has ended.
_IDLE = (
    "name", "runs", "resume", "launch.", "tracker.", "callbacks.", "log_every", "stop_at",
    "timeout_seconds", "checkpoint.", "save_every", "data.cache", "data.micro_rows",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One run of a sweep."""

    name: str
    varied: dict[str, str]
    """The keys that the sweep varies, with this job's values as they are written."""
    words: list[str]
    """Of `tessera train`."""
    folder: Path
    is_finished: bool
    processes: int
    best: "BestSpec"
    """What its evaluations are judged by."""


def plan(overrides: list[str], base: str, runs: Path) -> list[SweepJob]:
    """Return the jobs of a sweep in `runs`; ValueError for the first that cannot be trained."""
    found = combinations(overrides, command="sweep")
    names = [name_of(base, each.varied) for each in found]
    jobs = []
    for name, each in zip(names, found, strict=True):
        try:
            jobs.append(_job(name, each, runs))
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if each.varied else str(error)) from None
    return jobs


def name_of(base: str, varied: dict[str, str]) -> str:
    """Return NAME-KEY_VALUE-..., fit for a folder; a long one, or one that lost a character, ends
    in a hash of all."""
    whole = "-".join([base, *(f"{key}_{value}" for key, value in varied.items())])
    safe = re.sub(r"[^A-Za-z0-9._-]+", ".", whole)
    if safe == whole and len(safe) <= MAX_NAME:
        return safe
    return f"{safe[: MAX_NAME - 9]}-{sha256(whole.encode()).hexdigest()[:8]}"


def _job(name: str, combination: Combination, runs: Path) -> SweepJob:
    words = [*combination.words, f"name={name}", f"runs={quoted(str(runs))}"]
    request = read_request(words)
    tree = request.tree
    if tree["launch"].get("_target_") != LOCAL:
        raise ValueError("a sweep starts its jobs on this machine; set launch=local")
    if tree["resume"] != "auto" or tree["resume_step"] is not None:
        raise ValueError("jobs of a sweep go on by themselves; set resume=auto resume_step=null")
    wandb = (tree.get("tracker") or {}).get("wandb")
    if wandb and wandb.get("group") is None:  # so that the server shows them side by side
        words.append(f"tracker.wandb.group={quoted(runs.name)}")
    run, launch = bind_with_launch(tree)
    run.check(launch.world_size)
    num_steps = (run if run.max_steps else settled(run)).num_steps
    folder = runs / name
    is_finished = _has_finished(folder, tree, num_steps)
    if not is_finished:
        request.choose(num_steps)  # refuses a run in use, or of another config
    return SweepJob(
        name=name, varied=combination.varied, words=words, folder=folder, is_finished=is_finished,
        processes=launch.world_size, best=run.best,
    )  # fmt: skip


def _has_finished(folder: Path, tree: dict[str, Any], num_steps: int) -> bool:
    """Whether a job needs no start; ValueError where its numbers are those of another config."""
    from trainer.directory import CONFIG, is_unfinished
    from trainer.drift import difference, fits
    from trainer.stored_config import read_stored

    if not (folder / CONFIG).exists():
        return False
    stored = read_stored(folder / CONFIG)
    lengths = [stored.get(key) == tree.get(key) for key in ("max_steps", "max_epochs")]
    out_of_patience = all(lengths) and exit_code(folder) == FINISHED
    if is_unfinished(folder, num_steps) and not out_of_patience:
        return False
    for key, (was, now) in difference(stored, tree).items():
        if not fits(key, (*_IDLE, "max_steps", "max_epochs")):
            raise ValueError(
                f"{folder} has finished with {key}={was}, and it is {now} now; set sweep=NAME for "
                "a new sweep, or the key back"
            )
    return True


def exit_code(folder: Path) -> int | None:
    """Return the exit code of rank 0 in a run's newest start; None: it left none."""
    from trainer.directory import attempts_of

    attempts = attempts_of(folder)
    record = read_records(attempts[-1], [0])[0] if attempts else {}
    code = record.get("code")
    return code if isinstance(code, int) else None


def quoted(text: str) -> str:
    """Return a value that Hydra's grammar reads as this text: a backslash counts before quotes."""
    escaped = re.sub(
        r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text
    )
    return f'"{escaped}"'
