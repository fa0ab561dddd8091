"""`tessera doctor`: what of this machine would stop a run, or let somebody in."""

import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.floors import FLOORS, PYTHON, is_below
from launch.truth import truth
from launch.words import options_of

USAGE = """usage: tessera doctor [runs=DIR] [json=true]

Looks at versions, cores, memory, disk, shared memory and clock of this machine; starts nothing.
Exit code 1: something is below what Tessera needs.
"""
GIB = 1 << 30
MIN_MEMORY, MIN_DISK, MIN_SHARED = 1 * GIB, 1 * GIB, 64 << 20
MAX_SKEW_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    needed: str = ""
    """What there should be; empty: the finding is for information."""
    is_fine: bool = True
    remedy: str = ""


def main(arguments: list[str]) -> int:
    """Run all checks and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return FINISHED
    options = options_of("doctor", arguments, defaults={"runs": "runs", "json": "false"})
    is_json = truth("json", options["json"])
    findings = list(examine(Path(options["runs"]).expanduser()))
    if is_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.check) for finding in findings)
        print("\n".join(_line(finding, width) for finding in findings))
        print(_verdict(findings))
    return FINISHED if all(finding.is_fine for finding in findings) else CHECK_FAILED


def examine(runs: Path) -> Iterator[Finding]:
    """Yield what every check finds; `runs` is where runs are written."""
    yield check_python()
    yield from check_versions()
    yield check_torch()
    yield check_cores()
    yield check_memory()
    folder = _existing(runs)
    yield check_disk(folder)
    yield check_writers(folder)
    yield check_shared_memory()
    yield check_clock(folder)


def check_python() -> Finding:
    found, needed = sys.version_info[:2], ".".join(map(str, PYTHON))
    return Finding(
        check="python", found=sys.version.split()[0], needed=f">= {needed}",
        is_fine=found >= PYTHON, remedy=f"install Python {needed} or newer",
    )  # fmt: skip


def check_versions() -> Iterator[Finding]:
    """Compare what is installed with launch/floors.py; what others bring may be absent."""
    for name, floor in FLOORS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # a command that needs it says so, and pip installs it with the floor
        yield Finding(
            check=name, found=found, needed=f">= {floor.version}",
            is_fine=not is_below(found, floor.version),
            remedy=f"pip install '{name}>={floor.version}': {floor.reason}",
        )  # fmt: skip


def check_torch() -> Finding:
    """Say what torch was built for, and what it sees."""
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    devices = f"{count} x {' and '.join(names)}" if count else "no GPU"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    has_gpu = Path("/dev/nvidiactl").exists()
    return Finding(
        check="torch build", found=f"{torch.__version__} for {built}, {devices}",
        needed="a build that sees the GPU" if has_gpu else "", is_fine=bool(count) or not has_gpu,
        remedy="install the build of torch that fits the driver: pytorch.org/get-started",
    )  # fmt: skip


def check_cores() -> Finding:
    """Say how many cores this process may use: containers and schedulers give fewer."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count()
    return Finding(check="cores", found=f"{mine} of {all_cores}")


def check_memory() -> Finding:
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    free, total = values["MemAvailable"], values["MemTotal"]
    return _of_size("memory", free, total, MIN_MEMORY, "end other programs, or take a larger node")


def check_disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    return _of_size(f"disk of {folder}", usage.free, usage.total, MIN_DISK,
                    "delete old runs, or set runs=DIR on another disk")  # fmt: skip


def check_writers(folder: Path) -> Finding:
    """See that no stranger can put links or files in the place of a run's."""
    mode = folder.stat().st_mode
    is_open = bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
    return Finding(
        check=f"writers of {folder}", found="everybody" if is_open else stat.filemode(mode),
        needed="not everybody", is_fine=not is_open, remedy=f"chmod o-w {folder}",
    )  # fmt: skip


def check_shared_memory() -> Finding:
    """See that ranks of one machine can talk through memory; containers often give 64 MB."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(check="/dev/shm", found="none")
    usage = shutil.disk_usage(folder)
    remedy = "remove what lies in /dev/shm, or start the container with --shm-size=1g"
    return _of_size("/dev/shm", usage.free, usage.total, MIN_SHARED, remedy)


def check_clock(folder: Path) -> Finding:
    """Compare the clock with the disk's: by it, locks that other machines hold are judged."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tessera-doctor-") as file:
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        return Finding(
            check=f"clock of {folder}", found=f"cannot be written: {error.strerror}",
            needed="a folder to write runs in", is_fine=False, remedy="set runs=DIR",
        )  # fmt: skip
    return Finding(
        check=f"clock of {folder}", found=f"{skew:.1f} s apart from this machine's",
        needed=f"<= {MAX_SKEW_SECONDS:.0f} s", is_fine=skew <= MAX_SKEW_SECONDS,
        remedy="let both follow the same time server (chrony or ntpd)",
    )  # fmt: skip


def _of_size(check: str, free: int, total: int, least: int, remedy: str) -> Finding:
    return Finding(
        check=check, found=f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
        needed=f">= {least / GIB:.2g} GiB", is_fine=free >= least, remedy=remedy,
    )  # fmt: skip


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _line(finding: Finding, width: int) -> str:
    name = f"{finding.check:<{width}}"
    if finding.is_fine:
        return f"  ok    {name}  {finding.found}"
    return f"  BAD   {name}  {finding.found}, needed {finding.needed}; {finding.remedy}"


def _verdict(findings: list[Finding]) -> str:
    bad = [finding.check for finding in findings if not finding.is_fine]
    if not bad:
        return "all is as Tessera needs it"
    return f"{len(bad)} of {len(findings)} are not as needed: {', '.join(bad)} (exit code 1)"
