"""Which steps stay, and what is cleared away: only the holder of the run lock may delete.

Standard library only.
"""

import os
import re
import shutil
from pathlib import Path

from trainer.checkpoint.commit import MANIFEST, STEP, committed_steps, step_folder
from trainer.files import fsync_folder, write_text

_STAGING = re.compile(r"^step_\d{8}\.tmp-\d+(-\d+)?\Z", re.ASCII)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a step that must not be read any more to `step_N.<why>-k`, which frees its number."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    folder.rename(aside)
    fsync_folder(folder.parent)
    return aside


def tidy(parent: Path, newest: int, keep: int, best_step: int | None) -> None:
    """After the commit of step `newest`: delete what is old, and renew the hints."""
    retain(parent, keep, best_step)
    point(parent, newest, best_step)


def point(parent: Path, newest: int, best_step: int | None) -> None:
    """Let `latest` and `best`, the hints for people, name what is there."""
    write_text(parent / "latest", f"{step_folder(parent, newest).name}\n")
    if best_step is None:
        (parent / "best").unlink(missing_ok=True)
    else:
        write_text(parent / "best", f"{step_folder(parent, best_step).name}\n")


def retain(parent: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all but the newest `keep` steps and the best one, and staging folders of the dead."""
    old = (step for step in committed_steps(parent)[keep:] if step != best_step)
    for step in old:
        folder = step_folder(parent, step)
        # Without a manifest the step no longer exists: a crash from here on leaves only debris.
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)
    collect_debris(parent)


def collect_debris(parent: Path) -> None:
    """Delete staging folders and half-deleted steps; links are left alone. No save may go on."""
    if not parent.is_dir() or parent.is_symlink():
        return
    for entry in os.scandir(parent):
        is_half_deleted = STEP.match(entry.name) and not Path(entry.path, MANIFEST).exists()
        is_debris = _STAGING.match(entry.name) or is_half_deleted
        if entry.is_dir(follow_symlinks=False) and is_debris:
            shutil.rmtree(entry.path, ignore_errors=True)
