"""Which rank a process of `srun` is, in torchrun's variables. Standard library only."""

import re
from collections.abc import Mapping

from launch.meeting import PORTS

_FIRST = re.compile(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)")


def ranks_of_step(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would set; empty where this is no process of a step of several.

    A batch script has Slurm's number of tasks, too, but it is no task: it has no step's.
    """
    count = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or not count.isdigit() or int(count) < 2:
        return {}
    number = int(environ["SLURM_JOB_ID"]) * 97 + int(environ.get("SLURM_STEP_ID", 0))
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": count,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(PORTS[number % len(PORTS)]),
    }


def first_host(nodes: str) -> str:
    """Return the first name of a list as Slurm writes it: n[01-03,7],m2 begins with n01."""
    match = _FIRST.match(nodes)
    assert match  # every part of it may be empty
    return "".join(part or "" for part in match.groups())
