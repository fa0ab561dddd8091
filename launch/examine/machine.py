"""What of this machine, its packages and its limits would stop a run. Standard library only."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.examine import cgroup
from launch.examine.finding import GIB, Finding
from launch.floors import FLOORS, PYTHON, is_below

MIN_MEMORY, MIN_SHARED = 1 * GIB, 64 << 20
MIN_FILES, MIN_PROCESSES = 1024, 1024


def examine_machine() -> Iterator[Finding]:
    """Yield what every check of this machine finds."""
    yield check_python()
    yield from check_versions()
    yield check_cores()
    yield check_memory()
    yield check_shared_memory()
    yield from check_limits()


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


def check_cores() -> Finding:
    """Say how many cores this process may use: containers and schedulers give fewer."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count()
    quota = cgroup.cores()
    limited = f", time of {quota:.1f} of them granted (cgroup)" if quota else ""
    return Finding(check="cores", found=f"{mine} of {all_cores}{limited}")


def check_memory() -> Finding:
    """Compare what is free, on this machine and within the limit of our container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    free, total = values["MemAvailable"], values["MemTotal"]
    remedy = "end other programs, or take a larger node"
    limit = cgroup.memory_left()
    if limit and limit[1] < total:
        free, total = min(free, limit[0]), limit[1]
        remedy = "raise the memory limit of the container or the job (this is its cgroup's)"
    return Finding.of_size("memory", free, total, MIN_MEMORY, remedy)


def check_shared_memory() -> Finding:
    """See that ranks of one machine can talk through memory; containers often give 64 MB."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(check="/dev/shm", found="none")
    usage = shutil.disk_usage(folder)
    remedy = "remove what lies in /dev/shm, or start the container with --shm-size=1g"
    return Finding.of_size("/dev/shm", usage.free, usage.total, MIN_SHARED, remedy)


def check_limits() -> Iterator[Finding]:
    """Look at open files, processes, and memory that network cards may pin."""
    yield _limit("open files", resource.RLIMIT_NOFILE, MIN_FILES, "ulimit -n 65536")
    yield _limit("processes", resource.RLIMIT_NPROC, MIN_PROCESSES, "ulimit -u 65536")
    cards = Path("/sys/class/infiniband")
    has_cards = cards.is_dir() and any(cards.iterdir())
    least = resource.RLIM_INFINITY if has_cards else 0
    yield _limit("locked memory", resource.RLIMIT_MEMLOCK, least, "ulimit -l unlimited, for the "
                 "daemon that starts jobs, too: NCCL pins memory for InfiniBand")  # fmt: skip


def _limit(check: str, kind: int, least: int, remedy: str) -> Finding:
    soft, hard = resource.getrlimit(kind)
    is_fine = soft == resource.RLIM_INFINITY or soft >= least != resource.RLIM_INFINITY
    return Finding(
        check=check, found=f"{_named(soft)} (may be raised to {_named(hard)})",
        needed=f">= {_named(least)}", is_fine=is_fine, remedy=remedy,
    )  # fmt: skip


def _named(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
