"""A folder of tokens: shards, an index that says they are all there, and stores read from them."""

import re
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.data.shards import Footer, Shard, Vocabulary
from trainer.errors import DataError
from trainer.files import read_json, write_json

VERSION = 3  # part of every cache key: raise it when what is written for the same input changes
TRAIN, EVAL = "train", "eval"
INDEX = "index.json"
_MAX_OPEN = 256  # files of one store at a time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One shard in the index: what a store must know of it before it opens the file."""

    file: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, path: Path, footer: Footer) -> "Entry":
        return cls(
            file=path.name,
            num_tokens=footer.num_tokens,
            num_documents=footer.num_documents,
            num_bytes=footer.num_bytes,
            fingerprint=footer.fingerprint,
        )


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a complete folder holds. Written last: a folder without one is unfinished."""

    vocabulary: Vocabulary
    stores: dict[str, list[Entry]]
    """`train`, and `eval` where documents are held out."""

    def write(self, folder: Path) -> None:
        write_json(folder / INDEX, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Return the index of a folder; DataError for none, or one that names files elsewhere."""
        path = folder / INDEX
        try:
            tree: dict[str, Any] = read_json(path)
            stores = {
                name: [Entry(**entry) for entry in entries]
                for name, entries in tree["stores"].items()
            }
            index = cls(vocabulary=Vocabulary(**tree["vocabulary"]), stores=stores)
            names = [entry.file for entries in stores.values() for entry in entries]
            # Not by Path: of 1,000 shards that took 9 ms.
            foreign = next((name for name in names if "/" in name or name in ("", ".", "..")), None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is no index of shards: {error!r}; make it again") from None
        if foreign is not None:
            raise DataError(
                f"{path} names {foreign!r}, which is no file of its folder; make the folder again"
            )
        return index


class Part(NamedTuple):
    """The shards of one name in a folder."""

    folder: Path
    name: str
    source: str = ""
    """What people call it, where several sources are mixed."""


class TokenStore:
    """The shards of one part, or of several as if they were one. A shard is opened when it is read.

    `num_bytes` counts the UTF-8 bytes of its source texts, 0 where nobody knows.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        own = [Index.read(part.folder).stores[part.name] for part in parts]
        self.entries = [entry for entries in own for entry in entries]
        self.first_shards = [0, *accumulate(map(len, own))]
        """Of each part, then their number."""
        self.num_tokens = sum(entry.num_tokens for entry in self.entries)
        self.num_documents = sum(entry.num_documents for entry in self.entries)
        self.num_bytes = sum(entry.num_bytes for entry in self.entries)
        self.fingerprint = _fingerprint(self.entries)
        self.part_fingerprints = [_fingerprint(entries) for entries in own]
        self.first_documents = [0, *accumulate(entry.num_documents for entry in self.entries)]
        self._shards: dict[int, Shard] = {}
        self._open: dict[int, Shard] = {}  # the oldest first

    @property
    def num_sources(self) -> int:
        """How many sources are mixed; 0: there is one."""
        return len(self.parts) if len(self.parts) > 1 else 0

    def per_part(self, first_of_shards: list[int]) -> list[int]:
        """Return how much of what is counted from shard to shard belongs to each part."""
        bounds = [first_of_shards[shard] for shard in self.first_shards]
        return [stop - start for start, stop in pairwise(bounds)]

    def part_of(self, document: int) -> tuple[int, range]:
        """Return which part a document belongs to, and the documents of that part."""
        bounds = [self.first_documents[shard] for shard in self.first_shards]
        number = bisect_right(bounds, document) - 1
        return number, range(bounds[number], bounds[number + 1])

    def part_of_shard(self, number: int) -> int:
        """Return which part a shard belongs to."""
        return bisect_right(self.first_shards, number) - 1

    def cite(self, first: int, last: int) -> str:
        """Return how documents [first, last) of one part are named: `source/train[5:6]`."""
        number, own = self.part_of(first)
        part = self.parts[number]
        prefix = f"{part.source}/" if part.source else ""
        return f"{prefix}{part.name}[{first - own.start}:{last - own.start}]"

    def document(self, cited: str) -> int | None:
        """Return the document that `cite` names so; None: it names several, or another store's."""
        match = re.fullmatch(r".*\[(\d+):\d+\]", cited)
        if match is None:
            return None
        firsts = (self.first_documents[shard] for shard in self.first_shards[:-1])
        found = (first + int(match[1]) for first in firsts)
        return next(
            (n for n in found if n < self.num_documents and self.cite(n, n + 1) == cited), None
        )

    def shard(self, number: int) -> Shard:
        """Return a shard; DataError if it is not the one that the index lists."""
        shard = self._shards.get(number) or self._first_open(number)
        if number not in self._open:
            if len(self._open) == _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = shard
        return shard

    def _first_open(self, number: int) -> Shard:
        entry = self.entries[number]
        folder = self.parts[self.part_of_shard(number)].folder
        shard = self._shards[number] = Shard(folder / entry.file)
        if shard.footer.fingerprint != entry.fingerprint:
            raise DataError(
                f"{shard.path} is not the shard that {folder / INDEX} lists; "
                "bring that one back, or make the folder again"
            )
        return shard

    def check(self) -> None:
        """Open every shard: a missing or cut one is found now, not hours later."""
        for number in range(len(self.entries)):
            self.shard(number)


def _fingerprint(entries: list[Entry]) -> str:
    """Return a hash that stands for every byte of some shards."""
    fingerprints = "/".join(entry.fingerprint for entry in entries)
    return xxhash.xxh3_128_hexdigest(fingerprints.encode())
