"""Rows of files on this machine: text, jsonl, csv, parquet or arrow, read through `datasets`."""

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from trainer.data.named_sources import Source
from trainer.data.row_groups import check_row_groups
from trainer.data.streams import (
    OPTIONS,
    class_names,
    in_one_line,
    quiet_datasets,
    with_encoded_media,
)
from trainer.errors import DataError

FORMATS = {
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text",
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
PACKED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"Rar!": "rar", b"7z\xbc\xaf": "7-zip",
}  # fmt: skip
"""Programs that pack files, by the first bytes of what they make."""
_REPOSITORY = re.compile(r"(?:https://huggingface\.co/datasets/)?([\w.-]+/[\w.-]+)")


class LocalFiles:
    """All rows below a path, files in sorted order; a text file is one row."""

    def __init__(self, source: Source, key: str, limit: int | None) -> None:
        self.name, self.path, self.limit = key, source.path, limit
        source.refuse_hub_settings(key)
        self.root = Path(source.path).expanduser()
        self.files = list(self._list_files())
        if not self.files:
            raise ValueError(
                f"{key}={self.path} holds no file that can be read; give a folder or file with "
                f"{', '.join(FORMATS)}"
            )
        self.format = self._detect_format()
        for file in self.files:
            self._refuse_packed(file)
        self.is_text = self.format in ("text", "json", "csv")
        if self.is_text:
            self.files = [file for file in self.files if file.stat().st_size]
            if not self.files:
                raise ValueError(f"{key}={self.path} holds empty files only; give one with text")

    def _list_files(self) -> Iterable[Path]:
        if not self.root.exists():
            repository = _REPOSITORY.fullmatch(self.path)
            hub = f", or hf://datasets/{repository[1]} for that on the Hub" if repository else ""
            raise ValueError(
                f"{self.name}={self.path} does not exist; give an existing folder or file{hub}"
            )
        if self.root.is_file():
            return [self.root]
        return sorted(f for f in self.root.rglob("*") if f.suffix in FORMATS and f.is_file())

    def _detect_format(self) -> str:
        suffixes = {file.suffix for file in self.files}
        unknown = suffixes - set(FORMATS)
        if unknown:
            raise ValueError(
                f"{self.name}={self.path} ends in {unknown.pop()!r}; give one of "
                f"{', '.join(FORMATS)}"
            )
        formats = {FORMATS[suffix] for suffix in suffixes}
        if len(formats) > 1:
            raise ValueError(
                f"{self.name}={self.path} mixes {', '.join(sorted(formats))} files; "
                "keep one kind in the folder or give a single file"
            )
        return formats.pop()

    def _refuse_packed(self, file: Path) -> None:
        """Raise DataError for a packed file: `datasets` would unpack it, whatever its name says,
        and a few bytes can hold more than the memory does."""
        with open(file, "rb") as stream:
            start = stream.read(max(map(len, PACKED)))
        if start.startswith(tuple(PACKED)):
            kind = next(name for magic, name in PACKED.items() if start.startswith(magic))
            raise DataError(
                f"{file} is packed by {kind}, needed plain {self.format}; unpack it, or remove it"
            )

    @property
    def place(self) -> str:
        return str(self.root.absolute())

    def key(self) -> str:
        return hash_of(self.files, f"{self.format}/{self.limit}")

    def num_bytes(self) -> int | None:
        if not self.is_text or self.limit is not None:
            return None
        return sum(file.stat().st_size for file in self.files)

    def in_words(self) -> str:
        size = self.num_bytes()
        return f"{len(self.files):,} files" + (f", {size / 1e6:,.1f} MB" if size else "")

    def class_names(self, column: str) -> list[str] | None:
        return class_names(self._load(self.files), column)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, images and the like as they are stored."""
        return self._rows(self.files)

    def rows_of(self, file: Path) -> Iterator[dict[str, Any]]:
        """Yield the rows of one file."""
        return self._rows([file])

    def _rows(self, files: list[Path]) -> Iterator[dict[str, Any]]:
        datasets = quiet_datasets()
        try:
            stream = iter(with_encoded_media(self._load(files)))
            if self.format == "parquet":
                stream = _checked(stream, files)
            for row in islice(stream, self.limit):
                self._check_separator(row)
                yield row
        except StopIteration:  # datasets' way to say that a JSON file is empty
            return
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(self._reason(error)) from error

    def _load(self, files: list[Path]) -> Any:
        # Streaming: datasets' own cache would copy the corpus once more.
        return quiet_datasets().load_dataset(
            self.format, data_files=[str(file) for file in files], split="train", streaming=True,
            **OPTIONS[self.format],
        )  # fmt: skip

    def _reason(self, error: Exception) -> str:
        """Say which file it is: `datasets` does not. Reads all files up to that one once more."""
        datasets = quiet_datasets()
        for file in self.files:
            if self.is_text and (place := _not_utf8(file)) is not None:
                return f"{file} is not UTF-8 at byte {place}; convert it"
            try:
                for _ in self._load([file]):
                    pass
            except StopIteration:
                continue
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as found:
                return f"{file} cannot be read: {in_one_line(found)}; correct or remove it"
        return (
            f"{self.name}={self.path} has files that differ in columns or types: "
            f"{in_one_line(error)}; make them alike, or give one of them"
        )

    def _check_separator(self, row: dict[str, Any]) -> None:
        """Raise DataError for a csv file that seems to have other separators."""
        if self.format != "csv" or len(row) > 1:
            return
        (column,) = row
        if found := re.search(r"[;\t|]", column):
            raise DataError(
                f"{self.name}={self.path} has one column, {column!r}; csv needs commas between "
                f"columns, not {found[0]!r}; convert it"
            )


def _checked(stream: Iterator[Any], files: list[Path]) -> Iterator[Any]:
    """Yield the rows of parquet files, each of which is checked before its first row is read.

    A file that takes few bytes on disk may need as much memory as any: it may be packed better.
    """
    for file in files:
        yield from islice(stream, check_row_groups(file))
    yield from stream  # none, where its files are read in their order


def _not_utf8(file: Path) -> int | None:
    """Return the place of the first byte that is no UTF-8; None: there is none."""
    decoder, start = getincrementaldecoder("utf-8")(), 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            kept = len(decoder.getstate()[0])  # of a letter that the last block cut
            try:
                decoder.decode(block)
            except UnicodeDecodeError as found:
                return start - kept + found.start
            start += len(block)
    return None


def hash_of(files: list[Path], settings: str) -> str:
    """Return a hash of settings and of the names, sizes and times of files."""
    hasher = xxhash.xxh3_128(settings.encode())
    for file in files:
        info = file.stat()
        hasher.update(f"{file}/{info.st_size}/{info.st_mtime_ns}\n".encode())
    return hasher.hexdigest()
