"""Rows of webdataset-style tar shards: a sample is the members that share a name up to its dot.

    000017.json       {"question": .., "answer": ..}: the columns of the row
    000017.txt        its text, for captions
    000017.jpg        its image; of several, 000017.0.jpg, 000017.1.jpg, ..: in this order

Nothing is extracted: headers are read, and images stay where they are. Source of the naming:
github.com/webdataset/webdataset.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from trainer.data.images.references import ImageReference, PlacedRow, RowPlace
from trainer.data.local_files import hash_of
from trainer.data.named_sources import Source
from trainer.errors import DataError

SUFFIX = ".tar"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_TEXT_BYTES = 16 << 20  # of the texts of one sample
# Names without a dot, and hidden files, belong to no sample: as webdataset has it.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


class Member(NamedTuple):
    """A regular file in a tar file, or what stands in its place: a link, a device, a way out."""

    key: str
    """What the members of its sample share."""
    extension: str
    offset: int
    size: int
    is_file: bool


class TarRows:
    """All samples of the tar files at a path, files in sorted order."""

    def __init__(self, source: Source, key: str, limit: int | None) -> None:
        self.name, self.path, self.limit = key, source.path, limit
        source.refuse_hub_settings(key)
        path = Path(source.path).expanduser()
        self.root = path if path.is_dir() else path.parent
        self.files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]

    @property
    def place(self) -> str:
        return str(Path(self.path).expanduser().absolute())

    def key(self) -> str:
        return hash_of(self.files, f"tar/{self.limit}")

    def num_bytes(self) -> None:
        return None

    def in_words(self) -> str:
        return f"{len(self.files):,} tar files"

    def class_names(self, column: str) -> None:
        return None

    def rows(self) -> Iterator[dict[str, Any]]:
        return islice((row for file in self.files for row in self._rows_of(file)), self.limit)

    def _rows_of(self, path: Path) -> Iterator[PlacedRow]:
        file = str(path.relative_to(self.root))
        for _, members in groupby(_members(path), key=lambda member: member.key):
            yield _row(path, file, list(members))


def _members(path: Path) -> Iterator[Member]:
    """Yield the members of samples; DataError for a file that is cut or broken."""
    try:
        # "r:": an uncompressed file, in which an offset is a place.
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # all so far: of a large shard they fill the memory
                name = _NAME.fullmatch(member.name)
                if name and not member.isdir():
                    path_in = PurePosixPath(member.name)
                    stays = not path_in.is_absolute() and ".." not in path_in.parts
                    is_file = member.isreg() and not member.issparse() and stays
                    extension = name[2].lower()
                    yield Member(name[1], extension, member.offset_data, member.size, is_file)
            end = archive.offset
        with open(path, "rb") as raw:
            raw.seek(end)
            is_whole = raw.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} is no whole tar file: {error}; copy or pack it anew") from error
    if not is_whole:  # tarfile takes a broken header for the end
        raise DataError(f"{path} is broken or cut at byte {end}; copy or pack it anew")


def _row(path: Path, file: str, members: list[Member]) -> PlacedRow:
    """Return a sample as a row; where that cannot be done, one with the reason."""
    images = {
        member.extension: ImageReference(file=file, offset=member.offset, size=member.size)
        for member in members
        if member.extension.rpartition(".")[2] in IMAGE_SUFFIXES
    }
    odd = [member for member in members if not member.is_file]
    columns: dict[str, Any] = {}
    problem = None
    if odd:
        name = f"{odd[0].key}.{odd[0].extension}"
        problem = f"{name} is no regular file below the tar's root; pack it as one"
    else:
        try:
            columns = _columns(path, members)
        except (ValueError, RecursionError) as error:
            problem = f"sample {members[0].key}: {error}; pack it anew"
    if images and not any(columns.get(name) for name in ("image", "images")):
        columns["images"] = list(images.values())
    # A row may call an image by its extension, or by its name.
    known = images | {Path(f"{members[0].key}.{one}").name: ref for one, ref in images.items()}
    return PlacedRow(columns, RowPlace(members=known, problem=problem))


def _columns(path: Path, members: list[Member]) -> dict[str, Any]:
    """Return what the texts of a sample say; ValueError for what is no JSON object or no text."""
    texts = [member for member in members if member.extension in ("json", "txt")]
    size = sum(member.size for member in texts)
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"its texts have {size} bytes, more than {MAX_TEXT_BYTES}")
    columns: dict[str, Any] = {}
    with open(path, "rb") as file:
        for member in sorted(texts, key=lambda member: member.extension):  # .txt has the last word
            file.seek(member.offset)
            text = file.read(member.size).decode()
            if member.extension == "txt":
                columns["text"] = text
                continue
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError(f"its json is {type(found).__name__}, needed an object")
            columns |= found
    return columns
