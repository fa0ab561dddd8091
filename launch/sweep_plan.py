"""Which jobs a sweep has: one per combination, composed and checked before the first starts."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.compose import Combination, combinations
from launch.deadline import refuse_past
from launch.exit_codes import FINISHED
from launch.protocol import Job, Launch
from launch.queue import Queued, runs_in_queue
from launch.slurm import SlurmSpec
from launch.traces import read_records
from launch.train import bind_with_launch, read_request, settled

if TYPE_CHECKING:
    from trainer.best import BestSpec

TARGETS = ("launch.local.LocalSpec", "launch.slurm.SlurmSpec")
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
    job: Job
    """As `tessera train` would start it."""
    launch: Launch
    is_finished: bool
    queued: str = ""
    """As what Slurm has it: `running as 17_3`; empty: it has not."""
    best: "BestSpec"
    """What its evaluations are judged by."""

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def is_waiting(self) -> bool:
        """Whether it is to be started."""
        return not self.is_finished and not self.queued


def plan(overrides: list[str], base: str, runs: Path) -> list[SweepJob]:
    """Return the jobs of a sweep in `runs`; ValueError for the first that cannot be trained."""
    found = combinations(overrides, command="sweep")
    names = [name_of(base, each.varied) for each in found]
    queue = cache(partial(runs_in_queue, runs))  # Slurm is asked once, and only where it is meant
    jobs: list[SweepJob] = []
    for name, each in zip(names, found, strict=True):
        try:
            jobs.append(_job(name, each, runs, queue))
            _refuse_another_script(jobs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if each.varied else str(error)) from None
    return jobs


def listed(jobs: Iterable[SweepJob]) -> list[str]:
    """Return a line for each job: how it stands, and its name."""
    states = {job.name: job.queued or ("finished" if job.is_finished else "to run") for job in jobs}
    width = max(map(len, ("finished", *states.values())))
    return [f"{state:<{width}}  {name}" for name, state in states.items()]


def name_of(base: str, varied: dict[str, str]) -> str:
    """Return NAME-KEY_VALUE-..., fit for a folder; a long one, or one that lost a character, ends
    in a hash of all."""
    whole = "-".join([base, *(f"{key}_{value}" for key, value in varied.items())])
    safe = re.sub(r"[^A-Za-z0-9._-]+", ".", whole)
    if safe == whole and len(safe) <= MAX_NAME:
        return safe
    return f"{safe[: MAX_NAME - 9]}-{sha256(whole.encode()).hexdigest()[:8]}"


def _refuse_another_script(jobs: list[SweepJob]) -> None:
    """Raise ValueError where the newest job would not fit into the array of the first one."""
    from trainer.drift import difference

    first, last = (job.job.tree["launch"] for job in (jobs[0], jobs[-1]))
    if first != last and any(isinstance(job.launch, SlurmSpec) for job in jobs):
        keys = ", ".join(f"launch.{key}" for key in difference(first, last))
        raise ValueError(
            f"{keys} varies, and all jobs of a sweep on Slurm are tasks of one script; set it to "
            "one value, with a sweep=NAME for each"
        )


def _job(
    name: str, combination: Combination, runs: Path, queue: Callable[[], Mapping[Path, Queued]]
) -> SweepJob:
    words = [*combination.words, f"name={name}", f"runs={quoted(str(runs))}"]
    request = read_request(words)
    tree = request.tree
    if tree["launch"].get("_target_") not in TARGETS:
        raise ValueError(
            "a sweep starts its jobs on this machine or on Slurm; set launch=local or launch=slurm"
        )
    if tree["resume"] != "auto" or tree["resume_step"] is not None:
        raise ValueError("jobs of a sweep go on by themselves; set resume=auto resume_step=null")
    wandb = (tree.get("tracker") or {}).get("wandb")
    if wandb and wandb.get("group") is None:  # so that the server shows them side by side
        words.append(f"tracker.wandb.group={quoted(runs.name)}")
        wandb["group"] = runs.name
    run, launch = bind_with_launch(tree, words)
    run.check(launch.world_size)
    run = run if run.max_steps else settled(run)
    folder = runs / name
    is_finished = _has_finished(folder, tree, run.num_steps)
    is_for_slurm = isinstance(launch, SlurmSpec) and not is_finished
    queued = queue().get(folder.resolve()) if is_for_slurm else None
    if queued:
        _refuse_another_config(
            queued.place, tree, f"{folder} is {queued.words}", "scancel it, set sweep=NAME", _IDLE
        )
    elif not is_finished:
        refuse_past(tree["stop_at"])
        request.choose(run.num_steps)  # refuses a run in use, or of another config
    return SweepJob(
        name=name, varied=combination.varied, launch=launch, is_finished=is_finished, best=run.best,
        job=Job(run=run, tree=tree, folder=folder, end=None, words=tuple(words)),
        queued=queued.words if queued else "",
    )  # fmt: skip


def _has_finished(folder: Path, tree: dict[str, Any], num_steps: int) -> bool:
    """Whether a job needs no start; ValueError where its numbers are those of another config."""
    from trainer.directory import CONFIG, is_unfinished
    from trainer.stored_config import read_stored

    if not (folder / CONFIG).exists():
        return False
    stored = read_stored(folder / CONFIG)
    lengths = [stored.get(key) == tree.get(key) for key in ("max_steps", "max_epochs")]
    out_of_patience = all(lengths) and exit_code(folder) == FINISHED
    if is_unfinished(folder, num_steps) and not out_of_patience:
        return False
    idle = (*_IDLE, "max_steps", "max_epochs")
    _refuse_another_config(folder, tree, f"{folder} has finished", "set sweep=NAME", idle)
    return True


def _refuse_another_config(
    place: Path, tree: dict[str, Any], what: str, way: str, idle: tuple[str, ...]
) -> None:
    """Raise ValueError where another config lies in a folder, in more than keys that are idle."""
    from trainer.directory import CONFIG
    from trainer.drift import difference, fits
    from trainer.stored_config import read_stored

    for key, (was, now) in difference(read_stored(place / CONFIG), tree).items():
        if not fits(key, idle):
            raise ValueError(
                f"{what} with {key}={was}, and it is {now} now; {way} for a new sweep, or the key "
                "back"
            )


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
