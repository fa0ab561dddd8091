"""Which bytes of a file have one hash, and how a manifest says so in few words.

Sharded over N ranks, a file holds N pieces of every tensor. What a rank wrote of it has one hash,
and pieces of one length that ranks wrote in turn are one entry, a run: so 512 ranks take hardly
more words than 8. Standard library only.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trainer.errors import StorageError

Range = tuple[int, int]
"""Bytes [start, stop) of a file."""
Run = list[int]
"""The first part, the stride to the next one, how many pieces, and the bytes of each."""


class FilePart(NamedTuple):
    """What one rank wrote of one file of a checkpoint, or some of it, with one hash."""

    file: str
    ranges: list[Range]
    """Ascending."""
    xxh3: str
    """Of all ranges, one behind the other."""


def entry_of(file: str, num_bytes: int, parts: list[FilePart]) -> dict[str, Any]:
    """Return what a manifest says of a file; StorageError where a byte was written never or twice.

    Its pieces, in their order, are those of the runs, and every part has a hash.
    """
    parts = sorted(parts, key=lambda part: part.ranges[0])
    pieces = ((*one, number) for number, part in enumerate(parts) for one in part.ranges)
    runs: list[Run] = []
    covered = 0
    for start, stop, number in sorted(pieces):
        if start != covered:
            raise StorageError(
                f"{file}: bytes {covered} to {start} were written "
                f"{'never' if start > covered else 'twice'}; this is a defect, please report it"
            )
        covered = stop
        if not (runs and _goes_on(runs[-1], number, stop - start)):
            runs.append([number, 1, 1, stop - start])
    if covered != num_bytes:
        raise StorageError(f"{file}: its end was never written; please report this defect")
    return {"bytes": num_bytes, "runs": runs, "xxh3": [part.xxh3 for part in parts]}


def _goes_on(run: Run, number: int, size: int) -> bool:
    """Take a piece of part `number` into a run, if it fits."""
    first, stride, count, each = run
    if count == 1 and number == first:  # pieces of one part that touch are one
        run[3] += size
        return True
    if count == 1:
        stride = number - first
    if size != each or stride < 1 or number != first + stride * count:
        return False
    run[1:3] = stride, count + 1
    return True


def check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError for what `entry_of` would not say of a file, or its like of version 1."""
    if "pieces" in entry:
        numbers, lowest = [n for piece in entry["pieces"] for n in piece[:2]], 0
    else:
        runs, num_parts = entry["runs"], len(entry["xxh3"])
        numbers, lowest = [n for _, *positive in runs for n in positive[:2]], 1
        numbers += [1 + first for first, _, _, _ in runs] + [1 + size for *_, size in runs]
        if any(first + stride * (count - 1) >= num_parts for first, stride, count, _ in runs):
            raise ValueError("a piece has no hash")
        if sum(count * size for _, _, count, size in runs) != entry["bytes"]:
            raise ValueError("pieces are not all of a file")
    if not all(type(n) is int and n >= lowest for n in numbers):
        raise ValueError("a size is no count")
    if "pieces" not in entry:
        parts = (range(first, first + stride * count, stride) for first, stride, count, _ in runs)
        if len(set().union(*parts)) != num_parts:
            raise ValueError("a hash has no piece")


def hashed(entry: dict[str, Any]) -> Iterator[tuple[Iterable[Range], str]]:
    """Yield the ranges that have a hash together, and the hash."""
    for start, stop, xxh3 in entry.get("pieces", ()):  # version 1: one for each range
        yield [(start, stop)], xxh3
    for number, xxh3 in enumerate(entry.get("xxh3", ())):
        yield _ranges_of(entry["runs"], number), xxh3


def _ranges_of(runs: list[Run], number: int) -> Iterator[Range]:
    start = 0
    for first, stride, count, size in runs:
        place, rest = divmod(number - first, stride)
        if not rest and 0 <= place < count:
            yield start + place * size, start + (place + 1) * size
        start += count * size
