"""Writing shards: a file appears under its name when it is whole, and never before."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import xxhash

from trainer.data.shards import (
    BLOCK_BYTES,
    HASHES,
    HEADER,
    MAGIC,
    OF_BYTES,
    STARTS,
    TOKENS,
    VERSION,
    Footer,
    Section,
    Vocabulary,
    parse_footer,
)
from trainer.files import fsync_folder

NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})


class ShardWriter:
    """Takes documents one by one; `close` gives the file its name, `abort` removes it.

    Tokens go to the disk at once; the other sections (8 bytes per document) when it is closed.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary) -> None:
        self.path, self.vocabulary = path, vocabulary
        self.temporary = path.with_name(f".{path.name}.tmp")  # one name: a crash leaves one at most
        self._file = open(self.temporary, "wb", buffering=1 << 20)  # noqa: SIM115  as a writer
        self._file.write(bytes(HEADER.size))
        self._body = _Body(self._file)
        self._starts = [0]
        self._extra: dict[str, list[np.ndarray]] = {}
        self._starts_of: dict[str, list[int]] = {}
        self._num_bytes = 0

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    def add(
        self, tokens: np.ndarray, num_bytes: int, extra: Mapping[str, np.ndarray] = NOTHING
    ) -> None:
        """Add a document of `num_bytes` bytes of text, and its part of sections by other names."""
        self._body.write(tokens.astype(self.vocabulary.dtype).tobytes())
        self._starts.append(self.num_tokens + len(tokens))
        self._num_bytes += num_bytes
        for name, values in extra.items():
            self._extra.setdefault(name, []).append(values)
            if values.dtype == np.uint8:
                starts = self._starts_of.setdefault(name, [0])
                starts.append(starts[-1] + len(values))

    def close(self) -> Footer:
        """Write what is left, make it durable, and give the file its name."""
        sections = [
            Section(
                name=TOKENS,
                dtype=self.vocabulary.dtype.str,
                offset=HEADER.size,
                count=self.num_tokens,
            )
        ]
        sections.append(self._write(STARTS, np.array(self._starts, "<i8")))
        sections += [self._write(name, np.concatenate(v)) for name, v in self._extra.items()]
        for name, starts in self._starts_of.items():
            sections.append(self._write(name + OF_BYTES, np.array(starts, "<i8")))
        self._body.align()
        footer = seal(
            self._file,
            sections,
            self._body.hashes(),
            num_documents=len(self._starts) - 1,
            num_bytes=self._num_bytes,
            vocabulary=self.vocabulary,
        )
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.temporary, self.path)
        fsync_folder(self.path.parent)
        return footer

    def abort(self) -> None:
        """Remove what was written."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)

    def _write(self, name: str, values: np.ndarray) -> Section:
        self._body.align()
        section = Section(
            name=name, dtype=values.dtype.str, offset=self._body.stop, count=len(values)
        )
        self._body.write(values.tobytes())
        return section


class _Body:
    """What lies between header and hashes: written on, and hashed in blocks on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.stop = HEADER.size
        self._hasher, self._room = xxhash.xxh3_64(), BLOCK_BYTES
        self._hashes: list[int] = []

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.stop += len(data)
        rest = memoryview(data)
        while rest:
            part, rest = rest[: self._room], rest[self._room :]
            self._hasher.update(part)
            self._room -= len(part)
            if not self._room:
                self._end_block()

    def align(self) -> None:
        """Go on to a multiple of 8 bytes."""
        self.write(bytes(-self.stop % 8))

    def hashes(self) -> np.ndarray:
        """End the last block; return the hashes of all."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        return np.array(self._hashes, "<u8")

    def _end_block(self) -> None:
        self._hashes.append(self._hasher.intdigest())
        self._hasher, self._room = xxhash.xxh3_64(), BLOCK_BYTES


def seal(
    file: BinaryIO,
    sections: list[Section],
    hashes: np.ndarray,
    *,
    num_documents: int,
    num_bytes: int,
    vocabulary: Vocabulary,
) -> Footer:
    """Write hashes and footer where `file` stands, and the header at its beginning."""
    place = Section(name=HASHES, dtype="<u8", offset=file.tell(), count=len(hashes))
    tree = {
        "num_tokens": sections[0].count,
        "num_documents": num_documents,
        "num_bytes": num_bytes,
        "vocabulary": asdict(vocabulary),
        "sections": [asdict(section) for section in [*sections, place]],
        "xxh3_128_of_hashes": xxhash.xxh3_128_hexdigest(hashes.data),
    }
    text = json.dumps(tree, indent=1).encode()
    file.write(hashes.tobytes())
    file.write(text)
    file.seek(0)
    digest = xxhash.xxh3_128_digest(text)
    file.write(HEADER.pack(MAGIC, VERSION, place.stop, len(text), digest))
    file.flush()
    return parse_footer(text)
