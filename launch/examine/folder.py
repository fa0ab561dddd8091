"""Whether runs can be written in a folder: by whom, on what, how fast. Standard library only."""

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launch.examine.finding import GIB, Finding

MIN_DISK = 1 * GIB
MIN_SPEED = 10.0
"""MB/s; below it a checkpoint of 10 GB takes longer than a quarter of an hour."""
MAX_SKEW_SECONDS = 2.0
PROBE = ".tessera-doctor-"
PROBE_BYTES, SMALL_FILES = 64 << 20, 5
MOUNTS = Path("/proc/self/mountinfo")
NETWORK = re.compile(r"nfs4?|lustre|gpfs|beegfs|ceph|cifs|smb3?|9p|glusterfs|afs|fuse\..*|wekafs")
LOST = ("tmpfs", "ramfs", "overlay")
"""Kinds that end with the machine or the container."""


def examine_folder(runs: Path, *, is_quick: bool = False) -> Iterator[Finding]:
    """Yield what every check of the folder of runs finds; it need not exist yet."""
    folder = existing(runs)
    yield check_kind(folder)
    yield check_disk(folder)
    yield check_writers(folder)
    clock = check_clock(folder)
    yield clock
    has_room = shutil.disk_usage(folder).free > 2 * PROBE_BYTES
    if clock.is_fine and has_room and not is_quick:
        yield check_speed(folder)


def check_kind(folder: Path) -> Finding:
    """Say what the folder lies on."""
    kind, point = mount_of(folder)
    note = "shared over the network" if NETWORK.fullmatch(kind) else "of this machine alone"
    if kind in LOST:
        note = "gone with this machine or container: set runs=DIR on a disk that stays"
    return Finding(check="runs", found=f"{folder} on {kind} at {point}, {note}")


def mount_of(folder: Path, mounts: Path = MOUNTS) -> tuple[str, str]:
    """Return the kind of file system that holds a folder, and where it is mounted."""
    best = ("unknown", "/")
    for row in mounts.read_text().splitlines():
        before, _, after = row.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), before.split()[4])
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[1]):
            best = (after.split()[0], point)
    return best


def check_disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    remedy = "delete old runs, or set runs=DIR on another disk"
    return Finding.of_size("disk", usage.free, usage.total, MIN_DISK, remedy)


def check_writers(folder: Path) -> Finding:
    """See that no stranger can put links or files in the place of a run's."""
    mode = folder.stat().st_mode
    is_open = bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
    return Finding(
        check="writers", found="everybody" if is_open else stat.filemode(mode),
        needed="not everybody", is_fine=not is_open, remedy=f"chmod o-w {folder}",
    )  # fmt: skip


def check_clock(folder: Path) -> Finding:
    """Compare the clock with the disk's: by it, locks that other machines hold are judged."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PROBE) as file:
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        return Finding(
            check="clock of disk", found=f"{folder} cannot be written: {error.strerror}",
            needed="a folder to write runs in", is_fine=False, remedy="set runs=DIR",
        )  # fmt: skip
    return Finding(
        check="clock of disk", found=f"{skew:.1f} s apart from this machine's",
        needed=f"<= {MAX_SKEW_SECONDS:.0f} s", is_fine=skew <= MAX_SKEW_SECONDS,
        remedy="let both follow the same time server (chrony or ntpd)",
    )  # fmt: skip


def check_speed(folder: Path) -> Finding:
    """Write as a checkpoint does: much at once, and small files that must be safe one by one."""
    block = os.urandom(4 << 20)  # some disks store zeros for nothing
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=PROBE) as name:
            big = _seconds_to_write(Path(name, "big"), block, PROBE_BYTES // len(block))
            small = min(
                _seconds_to_write(Path(name, f"small{number}"), block[:4096], 1)
                for number in range(SMALL_FILES)
            )
    except OSError as error:
        found, speed = str(error.strerror), 0.0
    else:
        speed = PROBE_BYTES / big / 1e6
        found = f"{speed:.0f} MB/s with fsync, {small * 1e3:.1f} ms for a small file"
    return Finding(
        check="write speed", found=found, needed=f">= {MIN_SPEED:.0f} MB/s",
        is_fine=speed >= MIN_SPEED, remedy="set runs=DIR on a faster disk",
    )  # fmt: skip


def _seconds_to_write(path: Path, block: bytes, times: int) -> float:
    begin = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(times):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())
