"""Reading images below one folder and never outside of it, within limits on bytes and pixels."""

import os
import stat
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import xxhash
from PIL import Image

from trainer.data.examples import BadRowError
from trainer.data.images.decode import MAX_PIXELS, decode
from trainer.data.images.references import ImageReference
from trainer.data.images.tables import embedded_bytes

MAX_BYTES = 64 << 20  # of one encoded image
_REMEMBERED = 1 << 14  # images that are known to be whole: several rows may ask about one picture


class ImageFiles:
    """The images of one source. BadRowError says in one line what is wrong with one of them."""

    def __init__(self, root: Path, max_pixels: int = MAX_PIXELS) -> None:
        """`root`: the folder of the source, below which every file lies that is opened."""
        self.root, self.max_pixels = root, max_pixels
        self._real_root = root.resolve()
        self.sealed = lru_cache(maxsize=_REMEMBERED)(self._sealed)

    def read(self, reference: ImageReference) -> Image.Image:
        """Return an image as RGB; BadRowError also for another one than was sealed."""
        data = self._data(reference)
        if reference.xxh3 not in (None, xxhash.xxh3_64_hexdigest(data)):
            raise BadRowError("is another image than when documents were made")
        return decode(data, self.max_pixels)

    def _sealed(self, reference: ImageReference) -> ImageReference:
        """Decode an image once; return its reference with the hash of its bytes."""
        data = self._data(reference)
        decode(data, self.max_pixels)
        return replace(reference, xxh3=xxhash.xxh3_64_hexdigest(data))

    def _data(self, reference: ImageReference) -> bytes:
        path = self._path(reference.file)
        if reference.row is not None:
            data = embedded_bytes(path, reference.row, reference.cell)
            _check_size(len(data))
            return data
        try:
            return _part(path, reference.offset, reference.size)
        except OSError as error:
            raise BadRowError(
                f"cannot be read: {error.strerror}; bring it back, or drop the row"
            ) from None

    def _path(self, file: str) -> Path:
        """Return the real path of a file; BadRowError where links lead out of the folder."""
        try:
            path = (self._real_root / file).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop
            raise BadRowError(f"has no legal path: {error}; correct the row") from None
        if not path.is_relative_to(self._real_root):
            raise BadRowError(
                f"leads out of {self.root} by a link; move it into that folder, or mount it there"
            )
        return path


def _part(path: Path, offset: int | None, size: int | None) -> bytes:
    """Return `size` bytes from `offset` on, or a whole file; never more than MAX_BYTES."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # to open a pipe would wait for ever
        raise BadRowError("is no file; correct the row")
    wanted = info.st_size if size is None else size
    _check_size(wanted)
    with open(path, "rb") as file:
        file.seek(offset or 0)
        data = file.read(wanted)
    if len(data) < wanted:
        raise BadRowError(f"has {len(data)} bytes, needed {wanted}; copy it anew")
    return data


def _check_size(size: int) -> None:
    if not 0 < size <= MAX_BYTES:
        raise BadRowError(f"has {size} bytes, needed 1 to {MAX_BYTES}; replace it or drop the row")
