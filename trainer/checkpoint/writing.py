"""What ranks write into a staging folder, and how rank 0 learns of it: through files alone.

Standard library and xxhash only.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from trainer.checkpoint.commit import CHUNK
from trainer.checkpoint.parts import FilePart
from trainer.errors import StorageError
from trainer.files import naming

READY = "ready"  # in a staging folder: every file has been made
_PARTS = ".parts"
PART_BYTES = 1 << 28  # that have one hash, or one range of more: what few wrote many can check
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def stage(parent: Path, name: str, sizes: dict[str, int]) -> Path:
    """Make staging folder `name` with empty files of `sizes`; OSError where it exists already."""
    parent.mkdir(exist_ok=True)
    refuse_link(parent)
    staging = parent / name
    staging.mkdir()
    for folder in sorted({Path(file).parent for file in sizes} - {Path()}):
        (staging / folder).mkdir()
    for file, size in sizes.items():
        with _opened(staging / file, _NEW_FILE) as descriptor:
            os.ftruncate(descriptor, size)
    with _opened(staging / READY, _NEW_FILE):
        return staging


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file, no link; an error in the block or at the end names it."""
    descriptor = os.open(path, flags, 0o644)
    with naming(path):
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def refuse_link(folder: Path) -> None:
    """Raise StorageError where a link stands in for the folder: what it leads to is not ours."""
    if folder.is_symlink():
        raise StorageError(
            f"{folder} is a symbolic link to {os.readlink(folder)}, which is not followed; put the "
            "folder itself there, or give runs=DIR on the disk that it should be on"
        )


def write_parts(path: Path, name: str, ranges: Iterable[tuple[int, memoryview]]) -> list[FilePart]:
    """Write (offset, bytes) ranges of a file that `stage` made; return them with their hashes.

    `name` is the file's name within the checkpoint. One fsync at the end covers all ranges.
    """
    parts = []
    with _opened(path, os.O_WRONLY | os.O_NOFOLLOW) as descriptor:
        for some in _portions(ranges):
            hasher = xxhash.xxh3_128()
            for start, data in some:
                _write_range(descriptor, start, data, hasher)
            places = [(start, start + len(data)) for start, data in some]
            parts.append(FilePart(name, places, hasher.hexdigest()))
        os.fsync(descriptor)
    return parts


def _portions(
    ranges: Iterable[tuple[int, memoryview]],
) -> Iterator[list[tuple[int, memoryview]]]:
    """Yield ranges in their order, as many together as have one hash."""
    some: list[tuple[int, memoryview]] = []
    size = 0
    for start, data in sorted(ranges, key=lambda one: one[0]):
        if some and size + len(data) > PART_BYTES:
            yield some
            some, size = [], 0
        some.append((start, data))
        size += len(data)
    if some:
        yield some


def _write_range(descriptor: int, start: int, data: memoryview, hasher: xxhash.xxh3_128) -> None:
    done = 0
    while done < len(data):
        chunk = data[done : done + CHUNK]
        written = os.pwrite(descriptor, chunk, start + done)  # may be short
        hasher.update(chunk[:written])
        done += written


def publish_parts(staging: Path, rank: int, parts: list[FilePart]) -> None:
    """Leave the hashes of what was written for rank 0: by file, for no object is ever pickled."""
    path = staging / f"rank{rank:05d}{_PARTS}"
    text = json.dumps(parts).encode()
    with _opened(path.with_suffix(".part"), _NEW_FILE) as descriptor:
        _write_range(descriptor, 0, memoryview(text), xxhash.xxh3_128())
    path.with_suffix(".part").rename(path)  # rank 0 looks at any moment: whole or absent


def collect_parts(staging: Path, num_ranks: int) -> list[FilePart]:
    """Take what that many ranks publish, and leave only what belongs to the checkpoint."""
    wait_until(lambda: len(list(staging.glob(f"*{_PARTS}"))) >= num_ranks)
    parts = []
    for path in sorted(staging.glob(f"*{_PARTS}")):
        for file, ranges, xxh3 in json.loads(path.read_text()):
            parts.append(FilePart(file, [(start, stop) for start, stop in ranges], xxh3))
        path.unlink()
    (staging / READY).unlink()
    return parts


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look until it is so: this process is killed when another rank's part fails."""
    seconds = 0.001
    while not is_so():
        time.sleep(seconds)
        seconds = min(2 * seconds, 0.1)
