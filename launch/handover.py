"""What the submitting command hands over to the launchers of a job: a folder with two files.

config.yaml is the resolved config, launch.json how to start it. Neither is composed again: what is
edited after the submission does not change the job.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.watchdog import WatchdogSpec

PLAN, OUTCOME = "launch.json", "outcome"


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


def hand_over(
    place: Path, tree: dict[str, Any], folder: Path, *, nodes: int, processes: int,
    restarts: int, watchdog: WatchdogSpec | None,
) -> None:  # fmt: skip
    """Write both files into `place`, for launchers that anybody may start later."""
    import yaml

    from trainer.code_version import git_commit
    from trainer.directory import CONFIG
    from trainer.files import write_text

    handover = Handover(
        folder=str(folder.absolute()), nodes=nodes, processes=processes, restarts=restarts,
        watchdog=vars(watchdog) if watchdog else None, stop_at=tree["stop_at"],
        deterministic=tree["deterministic"], git_commit=git_commit(), key=secrets.token_hex(16),
    )  # fmt: skip
    write_text(place / CONFIG, yaml.safe_dump(tree, sort_keys=False))
    plan = place / PLAN
    plan.touch(mode=0o600)  # before the key is in it
    plan.write_text(json.dumps(asdict(handover), indent=1) + "\n")


def read_handover(place: Path) -> Handover:
    """Return what was handed over; ValueError where nothing was."""
    try:
        return Handover(**json.loads((place / PLAN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{place} holds no {PLAN} of a submitted run ({error}); submit it again, and set runs= "
            "to a folder that all nodes share"
        ) from None
