"""Rows with images: of jsonl, csv, parquet and arrow files, or of tar shards, on this machine."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.hub import is_on_hub
from trainer.data.images.references import ImageReference, PlacedRow, RowPlace
from trainer.data.images.tar_rows import SUFFIX, TarRows
from trainer.data.local_files import FORMATS, LocalFiles
from trainer.data.named_sources import Source
from trainer.data.sources import STANDARD_LIBRARY


def open_image_rows(source: Source, key: str, limit: int | None) -> "ImageRows":
    """Return the rows of a source, or its first `limit`; `key` is the config key of its path."""
    if is_on_hub(source.path):
        raise ValueError(
            f"{key}={source.path} is on the Hub, and images are read again in every epoch; "
            f"download its files (hf download), and set {key}=FOLDER"
        )
    if source.path == STANDARD_LIBRARY:
        raise ValueError(f"{key}=stdlib holds no images; give a folder or file of jsonl")
    path = Path(source.path).expanduser()
    is_tar = any(path.rglob(f"*{SUFFIX}")) if path.is_dir() else path.suffix == SUFFIX
    if not (is_tar and path.exists()):
        return FileRows(source, key, limit)
    other = next((file for file in path.rglob("*") if file.suffix in FORMATS), None)
    if other is not None:
        raise ValueError(
            f"{key}={source.path} mixes tar files and {other.name}; keep one kind in the folder or "
            "give a single file"
        )
    return TarRows(source, key, limit)


class FileRows:
    """Rows of files; those that hold images' bytes keep a reference to them instead."""

    def __init__(self, source: Source, key: str, limit: int | None) -> None:
        self.name, self.path, self.limit = key, source.path, limit
        self.files = LocalFiles(source, key, limit)
        root = self.files.root
        self.root = root if root.is_dir() else root.parent
        self.key, self.num_bytes = self.files.key, self.files.num_bytes
        self.in_words, self.class_names = self.files.in_words, self.files.class_names

    @property
    def place(self) -> str:
        return self.files.place

    def rows(self) -> Iterator[dict[str, Any]]:
        return islice(self._rows(), self.limit)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for path in self.files.files:
            file = path.relative_to(self.root)
            place = RowPlace(folder=str(file.parent))
            for number, row in enumerate(self.files.rows_of(path)):
                columns = {
                    column: _referenced(value, ImageReference(file=str(file), row=number), column)
                    for column, value in row.items()
                }
                yield PlacedRow(columns, place)


ImageRows = FileRows | TarRows
"""Yield PlacedRow; `root` is the folder below which all lies that they name."""


def _referenced(value: Any, row: ImageReference, *cell: str | int) -> Any:
    """Return a value with references in place of images, which `datasets` stores as {bytes, path}.

    One that has a path and no bytes is that path.
    """
    if isinstance(value, list):
        return [_referenced(item, row, *cell, number) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value and value.keys() <= {"bytes", "path"}:
        if value.get("bytes") is None:
            return value.get("path")
        return ImageReference(file=row.file, row=row.row, cell=cell)
    return {key: _referenced(item, row, *cell, key) for key, item in value.items()}
