"""What a rank writes of a checkpoint, and the copy of it: all that training waits for."""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.tensor_file import TensorFiles, own_ranges, plan
from trainer.pieces import Piece

_ALIGNMENT = 64  # bytes; any dtype may begin there


class Group(NamedTuple):
    """Tensors that lie in the same folder."""

    folder: str
    pieces: dict[str, Piece]
    """With whole rows."""
    files: TensorFiles

    @staticmethod
    def of(folder: str, stem: str, pieces: dict[str, Piece], max_bytes: int) -> "Group":
        """Plan the files of some pieces. Collective over the ranks that hold their columns."""
        whole = {name: piece.with_whole_rows() for name, piece in pieces.items()}
        return Group(folder, whole, plan(pieces, stem, max_bytes))

    @property
    def headers(self) -> dict[str, bytes]:
        """The beginnings of the files, by their names in the checkpoint."""
        return {f"{self.folder}/{file}": text for file, text in self.files.headers.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {f"{self.folder}/{file}": size for file, size in self.files.sizes.items()}


class Part(NamedTuple):
    """Elements that this rank writes, and where."""

    file: str
    """Name within the checkpoint."""
    offset: int
    """First byte of the file."""
    values: Tensor
    start: int
    """First byte of the shared memory."""

    @property
    def stop(self) -> int:
        return self.start + self.values.nbytes


def parts_of(groups: list[Group], files: dict[str, bytes]) -> list[Part]:
    """Return the rows that this rank answers for, and the beginnings or all of `files`."""
    parts: list[Part] = []
    start = 0
    for file, offset, values in (*_own(groups), *_bytes(files)):
        parts.append(Part(file, offset, values, start))
        start += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    return parts


def _own(groups: list[Group]) -> Iterator[tuple[str, int, Tensor]]:
    for group in groups:
        for name, piece in group.pieces.items():
            entry = group.files.entries[name]
            for offset, values in own_ranges(piece, entry):
                yield f"{group.folder}/{entry.file}", offset, values.detach()


def _bytes(files: dict[str, bytes]) -> Iterator[tuple[str, int, Tensor]]:
    for name, text in files.items():
        # torch sees no buffer in nothing.
        yield (
            name,
            0,
            torch.frombuffer(bytearray(text) or bytearray(1), dtype=torch.uint8)[: len(text)],
        )


def copy(parts: list[Part], memory: mmap.mmap) -> None:
    """Copy the parts into shared memory. sync: from a GPU, this waits for every step before."""
    for part in parts:
        count = part.values.numel()
        if count:
            target = torch.frombuffer(
                memory, dtype=part.values.dtype, count=count, offset=part.start
            )
            target.view(part.values.shape).copy_(part.values)


def ranges_of(parts: list[Part]) -> dict[str, list[tuple[int, int, int]]]:
    """Return (offset in the file, start and stop in the shared memory) by file."""
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    for part in parts:
        ranges.setdefault(part.file, []).append((part.offset, part.start, part.stop))
    return ranges
