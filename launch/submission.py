"""How runs come to Slurm: the folder of a job, its script, sbatch, and what the user is told."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.exit_codes import FINISHED
from launch.handover import hand_over
from launch.protocol import Job
from launch.sbatch import SCRIPT, log_of, render

if TYPE_CHECKING:
    from launch.slurm import SlurmSpec

ALLOCATION = "SLURM_JOB_ID"


def submit(spec: "SlurmSpec", jobs: Sequence[Job], name: str) -> int:
    """Submit one run as a job, or several as one array; 0 when Slurm has taken them.

    Inside of an allocation a run is started there instead. ValueError leaves nothing behind.
    """
    is_inside = ALLOCATION in os.environ
    if is_inside and len(jobs) > 1:
        raise ValueError(
            f"this is inside of job {os.environ[ALLOCATION]}, which cannot become an array of "
            f"{len(jobs)} runs; unset {ALLOCATION} to submit them"
        )
    if not is_inside and shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm needs the command sbatch, which is not on the path; submit on a "
            "login node of the cluster, or look at the script with dry_run=true"
        )
    places = [_place(job.folder) for job in jobs]
    try:
        for job, place in zip(jobs, places, strict=True):
            hand_over(
                place, job.tree, job.folder, nodes=spec.nodes, processes=spec.node_processes,
                restarts=spec.max_restarts(spec.world_size), watchdog=spec.watchdog,
            )  # fmt: skip
        script = places[0] / SCRIPT
        script.write_text(render(replace(spec, requeue=False) if is_inside else spec, places, name))
        if is_inside:
            _become(script)
        number = _submit(script)
    except ValueError:
        for place in places:
            _take_back(place)
        raise
    print("\n".join(_told(spec, number, jobs, places)))
    return FINISHED


def _told(spec: "SlurmSpec", number: str, jobs: Sequence[Job], places: Sequence[Path]) -> list[str]:
    """Return what a user does next."""
    log = log_of(places).replace("%j", number).replace("%A", number).replace("%a", "0")
    what = f"{spec.nodes} node(s) x {spec.node_processes} process(es)"
    runs = str(jobs[0].folder) if len(jobs) == 1 else f"{len(jobs)} runs, each on its own"
    limit = f"the limit of {spec.time}" if spec.time else "the limit of its partition"
    then = "Slurm queues it again, and it goes on" if spec.requeue else "the job is over"
    return [
        f"submitted job {number}: {what}, {runs}",
        f"  log     tail -F {shlex.quote(log)}",
        f"  state   squeue --job {number}",
        f"  cancel  scancel {number}    (it saves first, where the cluster leaves it time)",
        f"  limit   {spec.signal_seconds} s before {limit} it saves and ends with 75; {then}",
        f"  again   sbatch {shlex.quote(str(places[0] / SCRIPT))}",
    ]


def _place(folder: Path) -> Path:
    """Make and return a folder for the job beside the attempts of a run."""
    from trainer.directory import new_numbered

    return new_numbered(folder, "jobs")


def _take_back(place: Path) -> None:
    """Leave nothing of a submission that was refused."""
    shutil.rmtree(place)
    with suppress(OSError):  # something else is in there
        place.parent.rmdir()
        place.parent.parent.rmdir()


def _become(script: Path) -> NoReturn:
    """Train in the allocation that this command was started in."""
    os.execvp("bash", ["bash", str(script)])


def _submit(script: Path) -> str:
    """Hand the script to Slurm and return the number of the job; ValueError where it refuses."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise ValueError(
            f"Slurm did not take the job: {reason}; change what it names (launch.partition, "
            "account, time, gpus, ..)"
        )
    return done.stdout.strip().partition(";")[0]
