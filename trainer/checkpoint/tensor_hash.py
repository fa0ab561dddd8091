"""One number for all tensors of a checkpoint, whatever files and order they lie in."""

from pathlib import Path

import xxhash

from trainer.checkpoint.commit import CHUNK
from trainer.checkpoint.tensor_file import Entry, read_entries


def tensor_hash(folder: Path) -> str:
    """Return the hash of the safetensors files of `folder` and below: names, types, shapes, bytes.

    The sum of the tensors' own hashes, so their order does not count. Nothing else does: a folder
    that was split, merged or saved on other ranks has the same hash.
    """
    total = 0
    for below in sorted({path.parent for path in folder.rglob("*.safetensors")}):
        place = below.relative_to(folder).as_posix()
        for name, entry in read_entries(below).items():
            total += _hash(below, f"{place}/{name}", entry)
    return f"{total % (1 << 128):032x}"


def _hash(folder: Path, name: str, entry: Entry) -> int:
    hasher = xxhash.xxh3_128(f"{name} {entry.dtype} {list(entry.shape)}".encode())
    with open(folder / entry.file, "rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left and (chunk := file.read(min(CHUNK, left))):
            hasher.update(chunk)
            left -= len(chunk)
    return hasher.intdigest()
