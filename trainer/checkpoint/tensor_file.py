"""Safetensors files that many ranks write and read by byte range, without a gather."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.errors import StorageError
from trainer.files import json_text
from trainer.pieces import Piece

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
MAX_HEADER = 16 << 20  # bytes: some 150,000 tensors; read, they take a hundred times as much


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one whole tensor lies: bytes [start, stop) of `file`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def offset(self, element: int) -> int:
        """Return the byte of the file at which the flattened tensor's `element` begins."""
        return self.start + element * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """The plan of one or more safetensors files: headers, and the place of every tensor."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    entries: dict[str, Entry]


def plan(pieces: dict[str, Piece], stem: str, max_bytes: int) -> TensorFiles:
    """Lay the whole tensors out in files of at most `max_bytes` (one tensor may exceed it).

    Depends on names, shapes and dtypes only, so every rank makes the same plan. Names of several
    files are Hugging Face's: `stem-00001-of-00002.safetensors`.
    """
    groups: list[dict[str, Piece]] = [{}]
    filled = 0
    for name, piece in pieces.items():
        size = _num_bytes(piece)
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = piece
        filled += size
    headers, sizes, entries = {}, {}, {}
    for number, group in enumerate(groups, 1):
        several = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        file = f"{stem}{several}.safetensors"
        headers[file], sizes[file], found = _plan_file(file, group)
        entries.update(found)
    return TensorFiles(headers=headers, sizes=sizes, entries=entries)


def _plan_file(file: str, pieces: dict[str, Piece]) -> tuple[bytes, int, dict[str, Entry]]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, piece in pieces.items():
        size = _num_bytes(piece)
        header[name] = {
            "dtype": _NAMES[piece.local.dtype],
            "shape": list(piece.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    data = len(text).to_bytes(8, "little") + text
    return data, len(data) + position, _entries(file, header, len(data))


def _num_bytes(piece: Piece) -> int:
    return math.prod(piece.shape) * piece.local.element_size()


def _entries(file: str, header: dict[str, object], data_start: int) -> dict[str, Entry]:
    entries = {}
    for name, value in header.items():
        if name != "__metadata__":
            assert isinstance(value, dict)
            start, stop = value["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (start, stop, *value["shape"])):
                raise ValueError(f"{name!r} has an offset or a size that is no count")
            entries[name] = Entry(
                file=file,
                dtype=_DTYPES[value["dtype"]],
                shape=tuple(value["shape"]),
                start=data_start + start,
                stop=data_start + stop,
            )
    return entries


def read_entries(folder: Path) -> dict[str, Entry]:
    """Read the headers of all safetensors files of `folder`, checked before any byte is trusted."""
    entries: dict[str, Entry] = {}
    for path in sorted(filter(Path.is_file, folder.glob("*.safetensors"))):  # no pipe
        entries.update(read_header(path))
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of one file, checked before any byte is trusted."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise StorageError(f"{path} is no safetensors file: its header claims {length} bytes")
        try:
            header = json.loads(file.read(length))
            entries = _entries(path.name, header, 8 + length)
        except (
            ValueError, KeyError, AssertionError, TypeError, AttributeError, RecursionError
        ) as error:  # fmt: skip
            raise StorageError(f"{path} has a damaged header: {error!r}") from error
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        expected = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.start != position or entry.stop - entry.start != expected or entry.stop > size:
            raise StorageError(f"{path}: tensor {name!r} lies outside the file or overlaps another")
        position = entry.stop
    if position != size:
        raise StorageError(f"{path} has {size - position} bytes that belong to no tensor")
    return entries


def own_ranges(piece: Piece, entry: Entry) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset in the file, elements) of the rows that this rank answers for."""
    assert piece.has_whole_rows
    own = [rows for rows in piece.rows if rows.is_own]
    for rows, values in zip(own, piece.split_own(piece.local), strict=True):
        if len(rows):
            yield entry.offset(rows.start * piece.width), values


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the elements as bytes on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data.cast("B")


def read_elements(folder: Path, entry: Entry, start: int, stop: int, name: str) -> Tensor:
    """Read elements [start, stop) of the flat tensor, on the CPU, in the file's dtype."""
    count = (stop - start) * entry.dtype.itemsize
    data = np.fromfile(folder / entry.file, np.uint8, count=count, offset=entry.offset(start))
    if len(data) != count:
        raise StorageError(f"{folder / entry.file} ends inside tensor {name}")
    # torch views no empty array as another dtype: a rank may hold no rows of a tensor.
    return torch.from_numpy(data).view(entry.dtype) if count else torch.empty(0, dtype=entry.dtype)


def index_of(files: TensorFiles) -> dict[str, bytes]:
    """Return Hugging Face's index by its name, where the weights are in several files."""
    if len(files.headers) == 1:
        return {}
    total = sum(entry.stop - entry.start for entry in files.entries.values())
    weight_map = {name: entry.file for name, entry in files.entries.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {"model.safetensors.index.json": json_text(index).encode()}


def missing_and_unexpected(entries: dict[str, Entry], wanted: dict[str, Piece]) -> Iterator[str]:
    """Yield one line per tensor that only one side has."""
    yield from (f"{name} is missing" for name in wanted if name not in entries)
    yield from (f"{name} is unknown to the model" for name in entries if name not in wanted)
