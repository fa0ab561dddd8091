"""Where rows and texts come from: files, the Hub, or this Python's standard library."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import xxhash

from trainer.data.hub import HubRows, is_on_hub
from trainer.data.local_files import LocalFiles, hash_of
from trainer.data.named_sources import Source
from trainer.errors import DataError
from trainer.near_names import did_you_mean

STANDARD_LIBRARY = "stdlib"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Readable(Protocol):
    """What rows and texts have in common. Making one reads names only."""

    name: str
    """Config key of the path."""
    path: str

    @property
    def place(self) -> str:
        """What exactly is read: an absolute path, or a data set with its commit."""
        ...

    def key(self) -> str:
        """Return a hash that changes with what is read; reads none of it."""
        ...

    def num_bytes(self) -> int | None:
        """Return about how many bytes of text there are, markup included; None: unknown."""
        ...

    def in_words(self) -> str:
        """Return what there is to read, for people."""
        ...


class RowSource(Readable, Protocol):
    """Rows, each a dict of its columns, in a fixed order."""

    def rows(self) -> Iterator[dict[str, Any]]: ...

    def class_names(self, column: str) -> list[str] | None:
        """Return the names that the source gives to the integers of a column; None: it has none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of the corpus, with an id that does not depend on the order of reading."""

    id: str
    text: str


class TextSource(Readable, Protocol):
    """Texts in a fixed order."""

    def documents(self) -> Iterator[Document]:
        """Yield every text with an id that is stable while the source stays the same."""
        ...

    def peek(self) -> None:
        """Read the first text: what cannot be read is found before training."""
        ...


def open_rows(source: Source, key: str = "data.path", limit: int | None = None) -> RowSource:
    """Return the rows of a source, or its first `limit`; `key` is the config key of its path."""
    if source.path == STANDARD_LIBRARY:
        raise ValueError(f"{key}=stdlib holds no rows; give a folder or file of jsonl")
    return (HubRows if is_on_hub(source.path) else LocalFiles)(source, key, limit)


def open_texts(
    source: Source, column: str, key: str = "data.path", limit: int | None = None
) -> TextSource:
    """Return the texts of a source, or its first `limit`; of rows, those of a column."""
    if source.path == STANDARD_LIBRARY:
        return StandardLibrary(source, key, limit)
    return ColumnTexts(open_rows(source, key, limit), column)


def first_row(source: RowSource) -> dict[str, Any]:
    """Return the first row; ValueError if there is none."""
    row = next(source.rows(), None)
    if row is None:
        raise ValueError(f"{source.name}={source.path} holds no rows; give a file that has some")
    return row


class ColumnTexts:
    """The texts in a column of rows."""

    def __init__(self, source: RowSource, column: str) -> None:
        self.source, self.column = source, column
        self.name, self.path = source.name, source.path
        self.num_bytes, self.in_words = source.num_bytes, source.in_words

    @property
    def place(self) -> str:
        return self.source.place

    def key(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.source.key()}/{self.column}".encode())

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self.source.rows()):
            text = self._text(row, number)
            # By content: the hold-out stays the same when files are moved, renamed or added.
            yield Document(id=xxhash.xxh3_128_hexdigest(text.encode()), text=text)

    def peek(self) -> None:
        self._text(first_row(self.source), 0)

    def _text(self, row: dict[str, Any], number: int) -> str:
        if self.column not in row:
            hint = did_you_mean(self.column, row)
            raise ValueError(
                f"{self.name}={self.path} has no column {self.column!r}, only "
                f"{', '.join(sorted(row))}; {hint}set data.column to one of them"
            )
        text = row[self.column]
        if not isinstance(text, str):
            found = "null" if text is None else type(text).__name__
            raise DataError(
                f"row {number} of {self.path}: column {self.column!r} holds {found}, needed text; "
                "correct the row or drop it"
            )
        return text


class StandardLibrary:
    """The source files of the running Python, without its tests."""

    def __init__(self, source: Source, key: str, limit: int | None) -> None:
        self.name, self.path = key, source.path
        source.refuse_hub_settings(key)
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = list(standard_library(self.root)[:limit])

    @property
    def place(self) -> str:
        return self.path

    def key(self) -> str:
        return hash_of(self.files, STANDARD_LIBRARY)

    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def in_words(self) -> str:
        return f"{len(self.files):,} files"

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            # A few old files are not UTF-8; a replaced byte does no harm to training.
            text = file.read_text(encoding="utf-8", errors="replace")
            yield Document(id=str(file.relative_to(self.root)), text=text)

    def peek(self) -> None:
        """Do nothing: the modules are there, as this process runs them."""


@cache
def standard_library(root: Path) -> tuple[Path, ...]:
    """Return the modules in order; once a process, as they do not change while Python runs.

    What is left out is not entered: site-packages can be huge.
    """
    modules: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        modules += (Path(folder, name) for name in names if name.endswith(".py"))
    return tuple(sorted(modules))
