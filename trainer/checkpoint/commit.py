"""A checkpoint is either complete or invisible: staging, manifest, rename, retention.

Standard library and xxhash only, so that fault sweeps can kill it at every system call.

A step exists if and only if its folder `step_NNNNNNNN` holds a MANIFEST.json that verifies. What is
being written lies in `step_NNNNNNNN.tmp-G` (G: generation of the run lock) and is never read.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainer.errors import StorageError
from trainer.files import fsync_folder, write_text

MANIFEST = "MANIFEST.json"
VERSION = 1
_STEP = re.compile(r"^step_(\d{8})\Z", re.ASCII)
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FilePiece:
    """Bytes [start, stop) of one file of a checkpoint, with their hash."""

    file: str
    start: int
    stop: int
    xxh3: str


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
    return _STEP.match(entry.name)


def stage(parent: Path, step: int, generation: int) -> Path:
    """Make and return an empty staging folder for `step`."""
    parent.mkdir(parents=True, exist_ok=True)
    staging = parent / f"step_{step:08d}.tmp-{generation}"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    return staging


def write_pieces(
    path: Path, name: str, ranges: Iterable[tuple[int, memoryview]]
) -> list[FilePiece]:
    """Write (offset, bytes) ranges of a new or preallocated file; return them with their hashes.

    `name` is the file's name within the checkpoint. One fsync at the end covers all ranges.
    """
    pieces = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        for start, data in ranges:
            digest = _write_range(descriptor, start, data)
            pieces.append(FilePiece(file=name, start=start, stop=start + len(data), xxh3=digest))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return pieces


def _write_range(descriptor: int, start: int, data: memoryview) -> str:
    hasher = xxhash.xxh3_128()
    done = 0
    while done < len(data):
        chunk = data[done : done + _CHUNK]
        written = os.pwrite(descriptor, chunk, start + done)  # may be short
        hasher.update(chunk[:written])
        done += written
    return hasher.hexdigest()


def hash_small_files(staging: Path) -> list[FilePiece]:
    """Return every file of `staging` but the tensor files as one piece each."""
    pieces = []
    for path in sorted(staging.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            size = path.stat().st_size
            name = str(path.relative_to(staging))
            digest = hash_range(path, 0, size)
            pieces.append(FilePiece(file=name, start=0, stop=size, xxh3=digest))
    return pieces


def commit(
    staging: Path,
    final: Path,
    facts: dict[str, Any],
    pieces: list[FilePiece],
    fence: Callable[[], None],
) -> None:
    """Write the manifest last, make all durable, and rename `staging` to `final`.

    `fence` raises when this process is no longer the writer.
    """
    write_text(staging / MANIFEST, json.dumps(manifest(staging, facts, pieces), indent=1))
    for folder, _, _ in os.walk(staging):
        fsync_folder(Path(folder))
    fence()
    staging.rename(final)  # fails on a non-empty folder: a step is never overwritten
    fsync_folder(final.parent)


def manifest(folder: Path, facts: dict[str, Any], pieces: list[FilePiece]) -> dict[str, Any]:
    """Return the manifest: facts, and for each file its size and the hash of every piece."""
    files: dict[str, Any] = {}
    for piece in sorted(pieces, key=lambda p: (p.file, p.start)):
        entry = files.setdefault(
            piece.file, {"bytes": (folder / piece.file).stat().st_size, "pieces": []}
        )
        covered = entry["pieces"][-1][1] if entry["pieces"] else 0
        if piece.start != covered:
            raise StorageError(
                f"{piece.file}: bytes {covered} to {piece.start} were written "
                f"{'never' if piece.start > covered else 'twice'}; "
                "this is a defect, please report it"
            )
        entry["pieces"].append([piece.start, piece.stop, piece.xxh3])
    for name, entry in files.items():
        if entry["pieces"][-1][1] != entry["bytes"]:
            raise StorageError(f"{name}: its end was never written; please report this defect")
    body = {"version": VERSION, **facts, "files": files}
    return {**body, "xxh3_of_the_above": _body_hash(body)}


def _body_hash(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; StorageError where it is damaged or belongs to another step."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
        stated = body.pop("xxh3_of_the_above")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if stated != _body_hash(body):
        raise StorageError(f"{path} is damaged: its hash does not match its content")
    if folder.name != f"step_{body['step']:08d}":
        raise StorageError(f"{path} belongs to step {body['step']}")
    return body


def verify(folder: Path, body: dict[str, Any], part: int, parts: int) -> None:
    """Check every size and this part's share of the piece hashes; StorageError names the file."""
    listed = {folder / name for name in body["files"]}
    for path in sorted(folder.rglob("*.safetensors")):
        if path not in listed:
            raise StorageError(f"{path} is not in the manifest: it was never verified")
    number = 0
    for name, entry in body["files"].items():
        path = folder / name
        try:
            size = path.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise StorageError(f"{path} is missing: {error.strerror}") from error
        if size != entry["bytes"]:
            raise StorageError(f"{path} has {size} bytes, its manifest says {entry['bytes']}")
        for start, stop, stated in entry["pieces"]:
            if number % parts == part and hash_range(path, start, stop) != stated:
                raise StorageError(f"{path} is damaged between bytes {start} and {stop}")
            number += 1


def hash_range(path: Path, start: int, stop: int) -> str:
    """Return the hash of bytes [start, stop) of a file."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(_CHUNK, stop - start))):
            hasher.update(chunk)
            start += len(chunk)
    return hasher.hexdigest()


def set_aside(folder: Path, why: str) -> Path:
    """Rename a step that must not be read any more to `step_N.<why>-k`, which frees its number."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    folder.rename(aside)
    fsync_folder(folder.parent)
    return aside


def publish_pieces(staging: Path, who: str, pieces: list[FilePiece]) -> None:
    """Leave the hashes of what was written for rank 0: by file, for no object is ever pickled."""
    (staging / f"{who}.pieces").write_text(json.dumps([asdict(piece) for piece in pieces]))


def collected_pieces(staging: Path) -> list[FilePiece]:
    """Take what all ranks published."""
    pieces = []
    for path in sorted(staging.glob("*.pieces")):
        pieces += [FilePiece(**fields) for fields in json.loads(path.read_text())]
        path.unlink()
    return pieces


def retain(parent: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all but the newest `keep` steps and the best one, and staging folders of the dead.

    Only the holder of the run lock may call this, after a commit.
    """
    old = (step for step in committed_steps(parent)[keep:] if step != best_step)
    for step in old:
        folder = step_folder(parent, step)
        # Without a manifest the step no longer exists: a crash from here on leaves only debris.
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)
    collect_debris(parent)


def collect_debris(parent: Path) -> None:
    """Delete staging folders and half-deleted steps. Only the run lock's holder may call this."""
    if not parent.is_dir():
        return
    for entry in os.scandir(parent):
        is_staging = re.match(r"^step_\d{8}\.tmp-\d+$", entry.name)
        is_half_deleted = _STEP.match(entry.name) and not Path(entry.path, MANIFEST).exists()
        if entry.is_dir(follow_symlinks=False) and (is_staging or is_half_deleted):
            shutil.rmtree(entry.path, ignore_errors=True)
