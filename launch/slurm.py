"""`launch=slurm`: a job of one launcher per node, submitted with sbatch."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from launch.protocol import Job, Supervised
from launch.sbatch import Batch, render
from launch.submission import ALLOCATION, submit

_TIME = re.compile(r"(\d+-\d{1,2}(:[0-5]\d){0,2}|\d+:[0-5]\d(:[0-5]\d)?)\Z")
_WORD = re.compile(r"[A-Za-z0-9_.,:@+=/-]+\Z")
_EXPRESSION = re.compile(r"[A-Za-z0-9_.,:@+=/&|()*\[\]-]+\Z")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[^\x00-\x1f]+)?\Z")
ASK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class SlurmSpec(Supervised):
    """Submit the run as a Slurm job, or start it in the allocation that the command runs in."""

    nodes: int = 1
    processes: int | None = None
    """On each node; null: one for each of `gpus`, or one."""
    gpus: int | None = None
    """On each node; null: none are asked for."""
    cpus: int | None = None
    """Cores on each node, for all of its processes; null: what the partition gives."""
    memory: str | None = None
    """On each node, for example 64G; null: what the partition gives."""
    time: str | int | None = None
    """Limit of one start, for example 02:00:00 or 1-12:00:00; null: that of the partition."""
    signal_seconds: int = 120
    """How long before the limit the run is told to save and end."""
    requeue: bool = True
    """Whether a job that ended with 75 is queued again, under the same number."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    """Whether the nodes are not shared with other jobs."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, for example [--nodelist=n1,--mail-type=END]."""
    setup: str | list[str] = field(default_factory=list)
    """Lines of bash that prepare a node, for example `module load cuda`."""
    container: str | None = None
    """Image to train in, with Tessera installed; null: none."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees beside the run's and the working directory: SOURCE:TARGET."""
    python: str | None = None
    """Interpreter on the nodes; null: the one that submits, in a container its `python`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "processes", "gpus", "cpus", "signal_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"launch.{name}={value} is too few; set it to 1 or more")
        if self.gpus and self.processes and self.processes > self.gpus:
            raise ValueError(
                f"launch.processes={self.processes} is more than launch.gpus={self.gpus} on a "
                f"node, where each needs one; set launch.processes=null or launch.gpus="
                f"{self.processes}"
            )
        if self.time is not None and not _TIME.match(str(self.time)):
            raise ValueError(
                f"launch.time={self.time!r} is no time; set it to hours:minutes:seconds like "
                "02:00:00, or days-hours:minutes:seconds like 1-12:00:00"
            )
        if self.time is not None and _seconds(str(self.time)) <= self.signal_seconds:
            raise ValueError(
                f"launch.time={self.time!r} leaves nothing before the signal, which comes "
                f"{self.signal_seconds} s before its end; raise it, or lower launch.signal_seconds"
            )
        self._check_words()
        if self.mounts and not self.container:
            raise ValueError(
                "launch.mounts has no effect without a container; set launch.container=IMAGE, or "
                "leave it out"
            )

    def _check_words(self) -> None:
        """Raise ValueError for what would end a line of the script, or say something else there."""
        kinds = dict.fromkeys(("partition", "account", "qos", "reservation", "memory"), _WORD)
        for name, kind in {**kinds, "constraint": _EXPRESSION}.items():
            value = getattr(self, name)
            if value is not None and not kind.match(value):
                raise ValueError(
                    f"launch.{name}={value!r} has characters that no {name} of Slurm has; use "
                    "letters, digits and '_.,:@+=/-'"
                )
        for option in self.options:
            if not _OPTION.match(option):
                raise ValueError(
                    f"launch.options has {option!r}, which is no long option of sbatch; write "
                    "--name=value"
                )
        for name in ("container", "python"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"[\x00-\x1f]", value)):
                raise ValueError(f"launch.{name}={value!r} is no path or address; set one, or null")

    @property
    def node_processes(self) -> int:
        """Processes on each node."""
        return self.processes or self.gpus or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.node_processes

    @property
    def setup_lines(self) -> list[str]:
        return [self.setup] if isinstance(self.setup, str) else self.setup

    def check(self) -> None:
        """Raise ValueError for a partition that this cluster has not, or a wrong allocation."""
        if (number := os.environ.get(ALLOCATION)) is not None:
            found = os.environ.get("SLURM_JOB_NUM_NODES", "?")
            if found != str(self.nodes):
                raise ValueError(
                    f"launch.nodes={self.nodes}, but this is inside of job {number} with {found} "
                    f"node(s); set launch.nodes={found}, or unset {ALLOCATION} to submit a job"
                )
        elif self.partition is not None and shutil.which("sinfo"):
            partitions = _answer("sinfo", "--noheader", "--format=%R").split()
            unknown = set(self.partition.split(",")) - set(partitions)
            if partitions and unknown:
                raise ValueError(
                    f"launch.partition={self.partition} is no partition of this cluster; set it "
                    f"to one of {', '.join(sorted(set(partitions)))}"
                )

    def preview(self, job: Job) -> str:
        """Return the script that would be submitted."""
        place = job.folder.absolute() / "jobs" / "NNN"
        batch = Batch(name=job.folder.name, folder=place, places=[place])
        return f"# {batch.script}:\n{render(self, batch)}"

    def start(self, job: Job) -> int:
        """Submit the run; return 0 when Slurm has taken it."""
        return submit(self, job)


def _seconds(limit: str) -> int:
    """Return a limit of Slurm in seconds: [days-]hours:minutes:seconds, or minutes:seconds."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours come first, and the others may be left out
        parts += [0] * (3 - len(parts))
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


@cache  # the jobs of a sweep ask the same
def _answer(*command: str) -> str:
    """Return what a command of Slurm prints; nothing where it fails: sbatch will say why."""
    with suppress(OSError, subprocess.SubprocessError):
        found: Any = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=ASK_SECONDS
        )
        return str(found.stdout)
    return ""
