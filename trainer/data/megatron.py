"""Megatron's token files: PREFIX.idx says where the documents of PREFIX.bin begin.

    magic      9 bytes: MMIDIDX, 0, 0
    version    uint64: 1
    dtype      uint8: a code of DTYPES
    counts     uint64 each: sequences, document borders
    lengths    int32 of every sequence, in tokens
    pointers   int64 of every sequence, in bytes from the beginning of PREFIX.bin
    borders    int64: the first sequence of every document, then the number of sequences

Source: Megatron-LM, core/datasets/indexed_dataset.py. It has no checksum and names no tokenizer.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from trainer.data.shards import Vocabulary
from trainer.data.tokenise import Tokens, Written
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.folder_writer import FolderWriter

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True, kw_only=True)
class MegatronFiles:
    """A checked pair of files."""

    path: Path
    """PREFIX.bin."""
    dtype: np.dtype[Any]
    starts: np.ndarray
    """First token of every document, then the number of tokens."""

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def place(self) -> str:
        return str(self.path.with_suffix("").absolute())

    def key(self) -> str:
        """Return a hash that changes when a file changes; reads none."""
        parts = [self.path.resolve()]
        for path in (self.path, self.path.with_suffix(".idx")):
            info = path.stat()
            parts += [info.st_size, info.st_mtime_ns]  # type: ignore[list-item]
        return xxhash.xxh3_128_hexdigest("/".join(map(str, parts)).encode())

    def vocabulary(self, tokenizer: Vocabulary) -> Vocabulary:
        """Return `tokenizer` with the BOS and EOS that every document really has."""
        tokens = np.memmap(self.path, self.dtype, "r")
        sizes = np.diff(self.starts)
        is_full = bool(len(sizes)) and bool((sizes > 0).all())
        ends = {
            "bos_token_id": tokens[self.starts[:-1]] if is_full else np.empty(0),
            "eos_token_id": tokens[self.starts[1:] - 1] if is_full else np.empty(0),
        }
        found = {}
        for name, values in ends.items():
            token = getattr(tokenizer, name)
            found[name] = token if is_full and (values == token).all() else None
        return Vocabulary(tokenizer=tokenizer.tokenizer, vocab_size=tokenizer.vocab_size, **found)

    def documents(self, route: Callable[[str], str], writer: "FolderWriter") -> Tokens:
        """Yield the wanted documents; `route` takes an id by content. DataError: a foreign id."""
        tokens = np.memmap(self.path, self.dtype, "r")
        vocab_size = writer.vocabulary.vocab_size
        for first, last in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            document = tokens[first:last]
            if len(document) and not 0 <= document.min() <= document.max() < vocab_size:
                place = int(((document < 0) | (document >= vocab_size)).argmax())
                raise DataError(
                    f"{self.path} holds token {document[place]} at byte "
                    f"{(first + place) * self.dtype.itemsize}, the tokenizer has {vocab_size}; "
                    "give the tokenizer that made these files"
                )
            name = route(xxhash.xxh3_128_hexdigest(document.tobytes()))
            if writer.wants(name):
                yield Written(name, document, 0)


def open_megatron(prefix: str) -> MegatronFiles:
    """Read and check PREFIX.idx against PREFIX.bin; ValueError or DataError in one line."""
    index, path = Path(f"{prefix}.idx").expanduser(), Path(f"{prefix}.bin").expanduser()
    for file in (index, path):
        if not file.is_file():
            raise ValueError(f"megatron={prefix}: {file} does not exist; give the path before .bin")
    data = index.read_bytes()
    magic, version, code, num_sequences, num_borders = _header(index, data)
    if magic != MAGIC or version != 1:
        raise DataError(
            f"{index} begins with {magic!r}, version {version}; needed {MAGIC!r}, version 1"
        )
    if code not in DTYPES:
        raise DataError(f"{index} has dtype code {code}; needed one of {sorted(DTYPES)}")
    needed = HEADER.size + 12 * num_sequences + 8 * num_borders
    if len(data) not in (needed, needed + num_sequences):  # one more byte per sequence: its modes
        raise DataError(f"{index} has {len(data)} bytes, its counts say {needed}; copy it anew")
    at = HEADER.size
    lengths = np.frombuffer(data, "<i4", num_sequences, at)
    pointers = np.frombuffer(data, "<i8", num_sequences, at + 4 * num_sequences)
    borders = np.frombuffer(data, "<i8", num_borders, at + 12 * num_sequences)
    dtype = np.dtype(DTYPES[code])
    stops = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    wrong = np.flatnonzero((pointers != stops[:-1] * dtype.itemsize) | (lengths < 0))
    if len(wrong):
        raise DataError(
            f"{index}: sequence {wrong[0]} begins at byte {pointers[wrong[0]]}, needed "
            f"{stops[wrong[0]] * dtype.itemsize}: one sequence after the other; build it anew"
        )
    if path.stat().st_size != stops[-1] * dtype.itemsize:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, {index.name} says "
            f"{stops[-1] * dtype.itemsize}; copy both anew"
        )
    is_covering = num_borders > 0 and borders[0] == 0 and borders[-1] == num_sequences
    if not is_covering or (np.diff(borders) < 0).any():
        raise DataError(
            f"{index}: document borders {borders[:1]} to {borders[-1:]} do not ascend from 0 to "
            f"{num_sequences} sequences; build it anew"
        )
    return MegatronFiles(path=path, dtype=dtype, starts=stops[borders])


def _header(index: Path, data: bytes) -> tuple[Any, ...]:
    if len(data) < HEADER.size:
        raise DataError(f"{index} has {len(data)} bytes, its header alone has {HEADER.size}")
    return HEADER.unpack_from(data)
