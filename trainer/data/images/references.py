"""Where an image is stored: what shards of documents keep instead of its pixels."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from trainer.data.examples import BadRowError


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """A file below the folder of its source, or a part of one. It may move with that folder."""

    file: str
    offset: int | None = None
    """First byte of a member of a tar file; None: the image is the whole file, or a cell."""
    size: int | None = None
    """Bytes of that member."""
    row: int | None = None
    """Row of a parquet or arrow file."""
    cell: tuple[str | int, ...] = ()
    """Column, then keys and places inside its value."""
    xxh3: str | None = None
    """xxh3_64 of the encoded bytes, once they were read."""

    def __str__(self) -> str:
        if self.row is not None:
            return f"{self.file}, row {self.row}, {'/'.join(map(str, self.cell))}"
        return self.file if self.offset is None else f"{self.file} at byte {self.offset}"


@dataclass(frozen=True, kw_only=True)
class RowPlace:
    """Where a row stands, so that what it calls an image can be found."""

    folder: str = ""
    """Of its file, below the folder of the source: paths in the row begin here."""
    members: Mapping[str, ImageReference] | None = None
    """Of a sample in a tar file: the images that it may name. None: it names paths."""
    problem: str | None = None
    """Why no document can be made of the row; None: nothing is known against it."""

    def reference(self, value: Any) -> ImageReference:
        """Return what a row calls an image; BadRowError where it cannot be one."""
        if isinstance(value, ImageReference):
            return value
        if not isinstance(value, str):
            found = type(value).__name__
            raise BadRowError(f"an image is {found}, needed a path or bytes; correct the row")
        if self.members is not None:
            if value not in self.members:
                known = ", ".join(self.members) or "none"
                raise BadRowError(f"the sample has no image {value!r}, only {known}; pack it anew")
            return self.members[value]
        if "://" in value:
            raise BadRowError(f"image {value!r} is an address; download it, and name its path")
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts:
            raise BadRowError(
                f"image {value!r} leads out of the folder of its file; images lie in that folder "
                "or below, and paths begin there"
            )
        return ImageReference(file=str(PurePosixPath(self.folder, path)))


class PlacedRow(dict[str, Any]):
    """A row that knows where it stands: no column, so that the row's own hash is of its content."""

    place: RowPlace

    def __init__(self, columns: Mapping[str, Any], place: RowPlace) -> None:
        super().__init__(columns)
        self.place = place


def written(references: Iterable[ImageReference]) -> np.ndarray:
    """Return references as JSON, in bytes (uint8): a document's part of a shard."""
    trees = [
        {key: value for key, value in asdict(reference).items() if value not in (None, ())}
        for reference in references
    ]
    return np.frombuffer(json.dumps(trees).encode(), np.uint8)


def read(data: np.ndarray) -> tuple[ImageReference, ...]:
    """Return the references that `written` made bytes of."""
    trees = json.loads(data.tobytes())
    return tuple(ImageReference(**tree | {"cell": tuple(tree.get("cell", ()))}) for tree in trees)
