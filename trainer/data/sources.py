"""Where texts come from: files read through `datasets`, or this Python's standard library."""

import os
import sysconfig
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import xxhash

from trainer.errors import DataError

STANDARD_LIBRARY = "stdlib"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_FORMATS = {
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text",
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of the corpus, with an id that does not depend on the order of reading."""

    id: str
    text: str


def _standard_library_files(root: Path) -> Iterator[Path]:
    """Yield the modules, without entering what is left out: site-packages can be huge."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


class TextSource:
    """All texts under a path, in a fixed order. Making one reads names only."""

    def __init__(self, path: str, column: str, key: str = "data.path") -> None:
        self.path, self.column, self.name = path, column, key
        self.is_standard_library = path == STANDARD_LIBRARY
        self.root = (
            Path(sysconfig.get_path("stdlib"))
            if self.is_standard_library
            else Path(path).expanduser()
        )
        self.files = list(self._list_files())
        if not self.files:
            raise ValueError(
                f"{key}={path} holds no file that can be read; give a folder or file with "
                f"{', '.join(_FORMATS)}"
            )
        self.format = "text" if self.is_standard_library else self._detect_format()

    def _list_files(self) -> Iterable[Path]:
        if self.is_standard_library:
            return sorted(_standard_library_files(self.root))
        if not self.root.exists():
            raise ValueError(
                f"{self.name}={self.path} does not exist; give an existing folder or file"
            )
        if self.root.is_file():
            return [self.root]
        return sorted(f for f in self.root.rglob("*") if f.suffix in _FORMATS and f.is_file())

    def _detect_format(self) -> str:
        suffixes = {file.suffix for file in self.files}
        unknown = suffixes - set(_FORMATS)
        if unknown:
            raise ValueError(
                f"{self.name}={self.path} ends in {unknown.pop()!r}; "
                f"give one of {', '.join(_FORMATS)}"
            )
        formats = {_FORMATS[suffix] for suffix in suffixes}
        if len(formats) > 1:
            raise ValueError(
                f"{self.name}={self.path} mixes {', '.join(sorted(formats))} files; "
                "keep one kind in the folder or give a single file"
            )
        return formats.pop()

    def key(self) -> str:
        """Return a hash that changes when a file is added, removed or changed; reads none."""
        hasher = xxhash.xxh3_128(f"{self.format}/{self.column}".encode())
        for file in self.files:
            info = file.stat()
            hasher.update(f"{file}/{info.st_size}/{info.st_mtime_ns}\n".encode())
        return hasher.hexdigest()

    def num_bytes(self) -> int | None:
        """Return about how many bytes of text there are, markup included; None: compressed."""
        if self.format in ("parquet", "arrow"):
            return None
        return sum(file.stat().st_size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """Yield every text with an id that is stable while the files stay the same."""
        if self.is_standard_library:
            for file in self.files:
                # A few old files are not UTF-8; a replaced byte does no harm to training.
                text = file.read_text(encoding="utf-8", errors="replace")
                yield Document(id=str(file.relative_to(self.root)), text=text)
            return
        for number, row in enumerate(self.rows()):
            text = self._text(row, number)
            # By content: the hold-out stays the same when files are moved, renamed or added.
            yield Document(id=xxhash.xxh3_128_hexdigest(text.encode()), text=text)

    def peek(self) -> None:
        """Read the first row: a wrong column or an unreadable file is found before training."""
        if not self.is_standard_library:
            for row in self.rows():
                self._text(row, 0)
                return
            raise ValueError(f"{self.name}={self.path} holds no rows; give a file that has some")

    def _text(self, row: dict[str, object], number: int) -> str:
        if self.column not in row:
            near = get_close_matches(self.column, row, n=1)
            raise ValueError(
                f"{self.name}={self.path} has no column {self.column!r}, only "
                f"{', '.join(sorted(row))}; set data.column to "
                f"{f'{near[0]}, which is near' if near else 'one of them'}"
            )
        text = row[self.column]
        if not isinstance(text, str):
            raise DataError(
                f"row {number} of {self.path}: column {self.column!r} holds "
                f"{type(text).__name__}, needed text; correct the row or drop it"
            )
        return text

    def class_names(self, column: str) -> list[str] | None:
        """Return the names that the files give to the integers of a column; None: they give none.

        Parquet and arrow files that `datasets` wrote have them.
        """
        import datasets

        features = self._load().features or {}
        feature = features.get(column)
        while isinstance(feature, datasets.List | datasets.LargeList):
            feature = feature.feature
        return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def _load(self) -> Any:
        import datasets

        names = [str(file) for file in self.files]
        options = {"sample_by": "document"} if self.format == "text" else {}
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error says it all
        # Streaming: datasets' own cache would copy the corpus once more.
        return datasets.load_dataset(
            self.format, data_files=names, split="train", streaming=True, **options
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every row as a dict of its columns."""
        import datasets

        try:
            yield from self._load()
        except StopIteration:  # datasets' way to say that a JSON file is empty
            return
        except UnicodeDecodeError as error:
            raise DataError(self._not_utf8(error)) from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{self.name}={self.path} cannot be read: {error}") from error

    def _not_utf8(self, error: UnicodeDecodeError) -> str:
        """Say which file it is: `datasets` does not. Reads all files up to that one."""
        for file in self.files:
            decoder, start = getincrementaldecoder("utf-8")(), 0
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    kept = len(decoder.getstate()[0])  # of a letter that the last block cut
                    try:
                        decoder.decode(block)
                    except UnicodeDecodeError as found:
                        return (
                            f"{file} is not UTF-8 at byte {start - kept + found.start}; convert it"
                        )
                    start += len(block)
        return f"{self.name}={self.path} is not UTF-8: {error}; convert it"
