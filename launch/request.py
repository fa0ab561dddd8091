"""A composed command line, and the folder that its run lives in. Needs neither torch nor Hydra."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEASE_SECONDS = 75.0  # of a run whose node was lost: longer than its lease


@dataclass(frozen=True, kw_only=True)
class Request:
    """A composed command line, before anything of it was checked."""

    tree: dict[str, Any]
    """The resolved config, `launch` included: what config.yaml stores."""
    is_dry: bool
    words: tuple[str, ...] = ()
    """What it was composed of."""

    def locate(self, num_steps: int) -> Path:
        """Choose the run's folder, refuse what it cannot go on with; return a new attempt in it."""
        return new_start(self.choose(num_steps), self.tree, self.words)

    def choose(self, num_steps: int, *, may_join: bool = False) -> Path:
        """Return the folder of a run so long; ValueError when it is in use or belongs to another
        config."""
        from trainer.directory import choose_run

        tree = self.tree
        folder = choose_run(tree["runs"], tree["name"], num_steps, tree["resume"])
        refuse(folder, tree, may_join=may_join)
        return folder


def refuse(folder: Path, tree: dict[str, Any], *, may_join: bool = False) -> None:
    """Raise ValueError where a start with this config cannot go on with the run of a folder.

    `may_join`: others may be at work on it already.
    """
    from trainer.checkpoint.commit import committed_steps, read_manifest, step_folder
    from trainer.checkpoint.lock import refuse_if_locked
    from trainer.directory import CHECKPOINTS, CONFIG, read_rewind
    from trainer.drift import check_drift
    from trainer.errors import StorageError
    from trainer.stored_config import read_stored

    if not may_join:
        refuse_if_locked(folder)
    steps = committed_steps(folder / CHECKPOINTS)
    has_rewound = read_rewind(folder) == tree["resume_step"]
    if tree["resume_step"] is not None and tree["resume_step"] not in steps and not has_rewound:
        raise ValueError(
            f"resume_step={tree['resume_step']} has no checkpoint in {folder / CHECKPOINTS}; "
            f"set it to {f'one of {steps}' if steps else 'null'}"
        )
    asked = None if has_rewound else tree["resume_step"]
    for step in steps[:1] if asked is None else [asked]:
        with suppress(StorageError):  # damage is the ranks' to set aside
            read_manifest(step_folder(folder / CHECKPOINTS, step))
    if steps and (folder / CONFIG).exists():
        try:
            changes = check_drift(read_stored(folder / CONFIG), tree, tree["resume_allow"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        for key, (was, now) in changes.items():
            if not key.startswith(("resume", "launch", "name", "runs")):
                print(f"# changed since this run was saved: {key}: {was} -> {now}")


def once_free(
    start: Callable[[], Path], seconds: float, is_stopped: Callable[[], bool] = lambda: False
) -> Path | None:
    """Return what `start` returns, which is tried again while the run is locked, by a node that was
    lost perhaps; LockedError after so many seconds, None where a stop was asked for."""
    from trainer.errors import LockedError

    deadline = time.monotonic() + seconds
    while not is_stopped():
        try:
            return start()
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
    return None


def new_start(folder: Path, tree: dict[str, Any], words: tuple[str, ...] = ()) -> Path:
    """Make a new attempt in the folder of a run, with the resolved config and the words in it."""
    import yaml

    from trainer.directory import COMMAND, CONFIG, new_attempt
    from trainer.files import write_json, write_text
    from trainer.redaction import redact_tree

    attempt = new_attempt(folder)
    write_text(attempt / CONFIG, yaml.safe_dump(tree, sort_keys=False))
    if words:
        write_json(attempt / COMMAND, redact_tree({"words": words}))
    return attempt
