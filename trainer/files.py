"""Small files that must be whole or absent, and locks between processes of one machine."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON by temporary file and rename: a reader sees the old file or the new."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return `value` as the lines of a JSON file."""
    return json.dumps(value, indent=1) + "\n"


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; nothing where none can be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a torn last line is left out."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue  # torn by a crash in an earlier attempt
    return objects


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder and those above it; ValueError where the `setting` names none that can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ValueError(
            f"{error.filename} cannot be made: {error.strerror}; set {setting} to a folder where "
            "you may write"
        ) from None


def read_number(path: Path) -> int | None:
    """Return the whole number that a file holds; None where none can be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def read_keys(path: Path, advice: str = "give another folder") -> dict[str, Any]:
    """Return what a JSON file of keys holds; ValueError in one line where it holds none."""
    try:
        config = read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {advice}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; {advice}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys; {advice}")
    return config


def write_text(path: Path, text: str) -> None:
    """Write `text` by temporary file, fsync and rename; OSError where a link stands in its way."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: a crash leaves one at most
    with (
        naming(temporary),
        open(temporary, "w", encoding="utf-8", opener=_open_no_link) as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it was about: those of an open file do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def fsync_folder(path: Path) -> None:
    """Make the entries of a folder durable."""
    fsync_file(path, os.O_DIRECTORY)


def fsync_file(path: Path, flags: int = 0) -> None:
    """Make what any process has written to a file durable."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    with naming(path):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive file lock; call `on_wait` once if another process holds it.

    Polls, so that a signal handler gets a turn.
    """
    with open(path, "a", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                    on_wait = None
                time.sleep(0.05)
        yield
