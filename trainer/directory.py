"""Which folder a run lives in, and whether a start continues it.

Standard library and xxhash only.
"""

import errno
import os
import re
import stat
from itertools import count
from pathlib import Path

from trainer.checkpoint.commit import committed_steps
from trainer.evaluation_due import read_due
from trainer.files import read_number

CHECKPOINTS = "checkpoints"
CONFIG, ENVIRONMENT, MIX = "config.yaml", "environment.json", "mix.json"
COMMAND, VERDICT = "command.json", "verdict.json"  # of one start: its words; how it failed
REWIND = "rewound_to"
AUTO, NEVER = "auto", "never"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # a storage failure, no wrong setting
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


def choose_run(runs: str, name: str, max_steps: int, resume: str) -> Path:
    """Return a start's folder: an unfinished run of that name, or the next free NAME-2, NAME-3.

    A run is unfinished while its newest checkpoint lies before max_steps. `resume`: auto, never, or
    the folder of a run to go on with.
    """
    if resume not in (AUTO, NEVER):
        folder = Path(resume).expanduser()
        if not committed_steps(folder / CHECKPOINTS):
            raise ValueError(
                f"resume={resume} has no checkpoint; give the folder of a run, auto or never"
            )
        return folder
    if not _NAME.match(name):
        raise ValueError(
            f"name={name!r} is no folder name; use letters, digits, '.', '_' and '-' (100 at most)"
        )
    parent = Path(runs).expanduser()
    _refuse_open(parent)
    newest = parent / name
    for number in count(2):
        following = parent / f"{name}-{number}"
        if not following.exists():
            break
        newest = following
    else:
        raise AssertionError("count() has no end")
    is_free = not newest.exists()
    return newest if is_free or (resume == AUTO and is_unfinished(newest, max_steps)) else following


def _refuse_open(parent: Path) -> None:
    """Raise ValueError where anybody may put other files in the place of a run's."""
    mode = parent.stat().st_mode if parent.is_dir() else 0
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise ValueError(
            f"runs={parent} may be written by everybody, who could put files in the place of a "
            f"run's; chmod o-w {parent}, or set runs=DIR"
        )


def read_rewind(folder: Path) -> int | None:
    """Return the step that this run was last taken back to by `resume_step`, if any."""
    return read_number(folder / REWIND)


def is_unfinished(folder: Path, max_steps: int) -> bool:
    steps = committed_steps(folder / CHECKPOINTS)
    return not steps or steps[0] < max_steps or steps[0] == read_due(folder)


def _refuse_open_to_others(folder: Path) -> None:
    """Raise ValueError where other users may rename what lies in a folder.

    Of a folder of one's own group, as a umask of 002 makes it, nobody else is expected in it.
    """
    if not folder.exists():
        return
    found = folder.stat()
    is_shared = found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid()
    if (is_shared or found.st_mode & stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise ValueError(
            f"{folder} can be written by other users (mode {stat.S_IMODE(found.st_mode):04o}), who "
            f"could put another run in place of this one; run `chmod +t {folder}`, take the right "
            "from them, or set runs=DIR"
        )


def newest_step(folder: Path) -> int:
    """Return the newest committed step of a run; 0: there is none."""
    return max(committed_steps(folder / CHECKPOINTS), default=0)


def attempts_of(folder: Path) -> list[Path]:
    """Return the folders of a run's starts, the first one first."""
    found = (path for path in (folder / "attempts").glob("*") if path.name.isdigit())
    return sorted(found, key=lambda path: int(path.name))


def new_attempt(folder: Path) -> Path:
    """Make and return the folder of this start: attempts/001, 002, .. (mkdir decides a race)."""
    return new_numbered(folder, "attempts")


def new_numbered(folder: Path, kind: str) -> Path:
    """Make and return the next folder KIND/001, 002, .. of a run, with the run's own if need be."""
    parent = folder / kind
    for path in (folder.parent, folder):
        _refuse_open_to_others(path)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent.mkdir(exist_ok=True)
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise
        raise ValueError(
            f"{error.filename} cannot be made: {error.strerror}; set runs=DIR where you may write"
        ) from None
    taken = [int(entry.name) for entry in os.scandir(parent) if entry.name.isdigit()]
    for number in count(max(taken, default=0) + 1):
        try:
            (parent / f"{number:03d}").mkdir()
        except FileExistsError:
            continue
        return parent / f"{number:03d}"
    raise AssertionError("count() has no end")
