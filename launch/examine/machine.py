"""What of this machine, its packages and its limits would stop a run. Standard library only."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.examine.finding import GIB, Finding
from launch.floors import FLOORS, PYTHON, is_below
from trainer import cgroup
from trainer.sizes import in_memory

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
    """Say how many cores this process may use, and how many are wanted: containers and schedulers
    give fewer, and others' programs slow down what is timed."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count()
    quota = cgroup.cores()
    limited = f", time of {quota:.1f} of them granted (cgroup)" if quota else ""
    load = f", load of the last minute {os.getloadavg()[0]:.1f}"
    return Finding(check="cores", found=f"{mine} of {all_cores}{limited}{load}")


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
    remedy = "start the container with --shm-size=1g"
    if usage.total >= MIN_SHARED:
        remedy = f"remove what lies in /dev/shm, or {remedy}"
    return Finding.of_size("/dev/shm", usage.free, usage.total, MIN_SHARED, remedy)


def check_limits() -> Iterator[Finding]:
    """Look at open files, processes, and memory that network cards may pin."""
    yield _limit("open files", resource.RLIMIT_NOFILE, MIN_FILES, "nofile", "ulimit -n 65536")
    yield _limit("processes", resource.RLIMIT_NPROC, MIN_PROCESSES, "nproc", "ulimit -u 65536")
    cards = Path("/sys/class/infiniband")
    has_cards = cards.is_dir() and any(cards.iterdir())
    least = resource.RLIM_INFINITY if has_cards else 0
    remedy = "ulimit -l unlimited, for the daemon that starts jobs, too: NCCL pins memory for cards"
    yield _limit("locked memory", resource.RLIMIT_MEMLOCK, least, "memlock", remedy)


def _limit(check: str, kind: int, least: int, name: str, remedy: str) -> Finding:
    soft, hard = resource.getrlimit(kind)
    if not _reaches(hard, least):
        remedy = (
            f"as root: raise {name} in /etc/security/limits.conf and log in again, or start the "
            f"container with --ulimit {name}=.., then {remedy}"
        )
    spelled = in_memory if kind == resource.RLIMIT_MEMLOCK else str
    found, most, needed = (
        "unlimited" if limit == resource.RLIM_INFINITY else spelled(limit)
        for limit in (soft, hard, least)
    )
    return Finding(
        check=check, found=f"{found} (may be raised to {most})", needed=f">= {needed}",
        is_fine=_reaches(soft, least), remedy=remedy,
    )  # fmt: skip


def _reaches(limit: int, least: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= least != resource.RLIM_INFINITY
