"""What the submitting command hands over to the launchers of a job: a folder with two files.

config.yaml is the resolved config, launch.json how to start it. Neither is composed again: what is
edited after the submission does not change the job.
"""

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.exit_codes import NO_PROGRESS, PREEMPTED
from launch.protocol import RESTARTS, Job
from launch.watchdog import WatchdogSpec

PLAN, OUTCOME, HISTORY = "launch.json", "outcome", "history"


@dataclass(frozen=True, kw_only=True)
class Handover:
    """How the launchers of all nodes start a run."""

    folder: str
    """Of the run, on a file system that all nodes share."""
    nodes: int
    processes: int
    """On each node."""
    restarts: int
    watchdog: dict[str, float] | None
    stop_at: str | None
    deterministic: str | bool
    git_commit: str | None
    """Of the code that checked the config."""
    key: str
    """By which the launchers know each other."""
    counts_starts: bool = False
    """Whether the scheduler bounds how often it starts the job again: a lost node is worth it."""
    words: Sequence[str] = ()
    """Of the command that submitted it, for the record of every start."""


def hand_over(
    place: Path, job: Job, *, nodes: int, processes: int, restarts: int,
    watchdog: WatchdogSpec | None,
) -> None:  # fmt: skip
    """Write both files into `place`, for launchers that anybody may start later."""
    from trainer.directory import CONFIG
    from trainer.files import write_text

    config, text = handover_texts(
        job, nodes=nodes, processes=processes, restarts=restarts, watchdog=watchdog
    )
    write_text(place / CONFIG, config)
    plan = place / PLAN
    plan.touch(mode=0o600)  # before the key is in it
    plan.write_text(text)


def handover_texts(
    job: Job, *, nodes: int, processes: int, restarts: int, watchdog: WatchdogSpec | None,
    counts_starts: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Return what both files hold."""
    import yaml

    from trainer.code_version import git_commit
    from trainer.redaction import redact_tree

    tree = job.tree
    handover = Handover(
        folder=str(job.folder.absolute()), nodes=nodes, processes=processes, restarts=restarts,
        watchdog=vars(watchdog) if watchdog else None, stop_at=tree["stop_at"],
        deterministic=tree["deterministic"], git_commit=git_commit(), key=secrets.token_hex(16),
        counts_starts=counts_starts, words=redact_tree(job.words),
    )  # fmt: skip
    config = yaml.safe_dump(tree, sort_keys=False)
    return config, json.dumps(asdict(handover), indent=1) + "\n"


def note_outcome(place: Path, code: int, committed: int) -> int:
    """Write down how a start of the job has ended, and with which newest step; return the code.

    srun does not know it of a launcher that was killed. What was stopped RESTARTS times in a row
    without a new checkpoint ends with 93: a limit that leaves no time for a save would come for
    ever.
    """
    line = f"{code} {committed}"
    with suppress(OSError):  # a folder that is only for reading: nobody asks there
        with open(place / HISTORY, "a", encoding="utf-8") as history:
            history.write(f"{line}\n")
        lines = (place / HISTORY).read_text(encoding="utf-8").splitlines()
        if code == PREEMPTED and lines[-RESTARTS - 1 :] == [line] * (RESTARTS + 1):
            code = NO_PROGRESS
        (place / OUTCOME).write_text(f"{code}\n")
    return code


def read_handover(place: Path) -> Handover:
    """Return what was handed over; ValueError where nothing was."""
    try:
        return Handover(**json.loads((place / PLAN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{place} holds no {PLAN} of a submitted run ({error}); submit it again, and set runs= "
            "to a folder that all nodes share"
        ) from None
