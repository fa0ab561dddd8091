"""A checkpoint is either complete or invisible: the manifest, the rename, and what is verified.

Standard library and xxhash only, so that fault sweeps can kill it at every system call.

A step exists if and only if its folder `step_NNNNNNNN` holds a MANIFEST.json that verifies. What is
being written lies in `step_NNNNNNNN.tmp-G-N` (G: generation of the run lock, N: number of the save)
and is never read.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from trainer.checkpoint.parts import FilePart, Range, check_entry, entry_of, hashed
from trainer.errors import StorageError
from trainer.files import fsync_folder, write_text

MANIFEST = "MANIFEST.json"
VERSION = 2  # 1 had a hash for every range
STEP = re.compile(r"^step_(\d{8})\Z", re.ASCII)
CHUNK = 1 << 22  # bytes per read or write


def step_folder(parent: Path, step: int) -> Path:
    return parent / f"step_{step:08d}"


def committed_steps(parent: Path) -> list[int]:
    """Return the steps that have a manifest, newest first. Links are not followed."""
    if not parent.is_dir():
        return []
    steps = [int(match[1]) for entry in os.scandir(parent) if (match := _is_step(entry))]
    return sorted(steps, reverse=True)


def _is_step(entry: os.DirEntry[str]) -> re.Match[str] | None:
    if not entry.is_dir(follow_symlinks=False) or not Path(entry.path, MANIFEST).is_file():
        return None
    return STEP.match(entry.name)


def commit(
    staging: Path,
    final: Path,
    facts: dict[str, Any],
    parts: list[FilePart],
    fence: Callable[[], None],
) -> None:
    """Write the manifest last, make all durable, and rename `staging` to `final`.

    `fence` raises when this process is no longer the writer.
    """
    write_text(staging / MANIFEST, _text(manifest(staging, facts, parts)))
    for folder, _, _ in os.walk(staging):
        fsync_folder(Path(folder))
    fence()
    staging.rename(final)  # fails on a non-empty folder: a step is never overwritten
    fsync_folder(final.parent)


def manifest(folder: Path, facts: dict[str, Any], parts: list[FilePart]) -> dict[str, Any]:
    """Return the manifest: facts, and for each file its size and the hash of every part."""
    of_files: dict[str, list[FilePart]] = {}
    for part in sorted(parts, key=lambda part: part.file):
        of_files.setdefault(part.file, []).append(part)
    files = {
        name: entry_of(name, (folder / name).stat().st_size, own) for name, own in of_files.items()
    }
    body = {"version": VERSION, **facts, "files": files}
    return {**body, "xxh3_of_the_above": _body_hash(body)}


def _text(body: dict[str, Any]) -> str:
    """Return a manifest as JSON with a line for each file."""
    rest = json.dumps({name: value for name, value in body.items() if name != "files"}, indent=1)
    files = ",\n".join(f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in body["files"].items())
    return f'{{\n "files": {{\n{files}\n }},{rest.removeprefix("{")}\n'


def _body_hash(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; StorageError where it is damaged or belongs to another step, ValueError
    where a newer version of this code wrote it."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
        # Every version has both, so that damage to the number is not taken for a newer one.
        is_whole = body.pop("xxh3_of_the_above") == _body_hash(body)
        is_newer = is_whole and body["version"] > VERSION
        if not is_newer:
            _check(body["step"], body["files"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error!r}") from error
    if is_newer:
        raise ValueError(
            f"{path} was written by a newer Tessera (version {body['version']} of it, this one "
            f"reads {VERSION}); use that one, or go back to a step that this one saved: "
            "resume_step=N"
        )
    if not is_whole:
        raise StorageError(f"{path} is damaged: its hash does not match its content")
    if folder.name != f"step_{body['step']:08d}":
        raise StorageError(f"{path} belongs to step {body['step']}")
    return body


def _check(step: Any, files: Any) -> None:
    """Raise an error of some kind for what no manifest of a version that is read would say."""
    for number in (step, *(entry["bytes"] for entry in files.values())):
        if type(number) is not int or number < 0:
            raise ValueError("a step or a size is no count")
    for entry in files.values():
        check_entry(entry)


def verify(folder: Path, body: dict[str, Any], part: int, parts: int) -> None:
    """Check every size and this part's share of the hashes; StorageError names the file."""
    listed = {folder / name for name in body["files"]}
    for path in sorted(folder.rglob("*.safetensors")):
        if path not in listed:
            raise StorageError(f"{path} is not in the manifest: it was never verified")
    number = 0
    for name, entry in body["files"].items():
        path = folder / name
        size = _size_inside(folder, name)
        if size != entry["bytes"]:
            raise StorageError(f"{path} has {size} bytes, its manifest says {entry['bytes']}")
        for ranges, stated in hashed(entry):
            if number % parts == part and hash_ranges(path, found := list(ranges)) != stated:
                raise StorageError(
                    f"{path} is damaged between bytes {found[0][0]} and {found[-1][1]}"
                )
            number += 1


def _size_inside(folder: Path, name: str) -> int:
    """Return the size of a file that lies in `folder` itself: a manifest may name any path."""
    path, parts = folder, Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise StorageError(f"{folder / MANIFEST} names {name!r}, which is no file of a checkpoint")
    for part in parts:
        path = path / part
        try:
            found = path.lstat()
        except OSError as error:
            raise StorageError(f"{path} is missing: {error.strerror}") from error
        wanted = stat.S_ISREG if path == folder / name else stat.S_ISDIR
        if not wanted(found.st_mode):
            raise StorageError(
                f"{path} is a link, or no {'file' if path == folder / name else 'folder'}: "
                "nothing outside a checkpoint is read"
            )
    return found.st_size


def hash_ranges(path: Path, ranges: list[Range]) -> str:
    """Return the hash of byte ranges [start, stop) of a file, one behind the other."""
    hasher = xxhash.xxh3_128()
    longest = max((stop - start for start, stop in ranges), default=0)
    buffer = memoryview(bytearray(min(CHUNK, longest)))
    with open(path, "rb", buffering=0) as file:
        for start, stop in ranges:
            file.seek(start)
            while start < stop and (count := file.readinto(buffer[: stop - start])):
                hasher.update(buffer[:count])
                start += count
    return hasher.hexdigest()
