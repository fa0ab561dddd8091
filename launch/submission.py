"""How runs come to Slurm: the folder of a job, its script, sbatch, and what the user is told."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.exit_codes import FINISHED
from launch.handover import hand_over
from launch.protocol import Job
from launch.sbatch import Batch, render

if TYPE_CHECKING:
    from launch.slurm import SlurmSpec

ALLOCATION = "SLURM_JOB_ID"


def submit(spec: "SlurmSpec", job: Job) -> int:
    """Submit a run; 0 when Slurm has taken it. ValueError leaves nothing behind.

    Inside of an allocation it is started there instead.
    """
    is_inside = ALLOCATION in os.environ
    if not is_inside:
        _refuse_without_slurm()
    with _folders() as made:
        place = made(job.folder)
        batch = Batch(name=job.folder.name, folder=place, places=[place])
        number = _handed_over(replace(spec, requeue=False) if is_inside else spec, [job], batch)
    what = f"{_size(spec)}, {job.folder}"
    print("\n".join([f"submitted job {number}: {what}", *_told(spec, number, batch)]))
    return FINISHED


def submit_array(spec: "SlurmSpec", jobs: Sequence[Job], folder: Path, at_once: int | None) -> None:
    """Submit several runs as one array, with its script in `folder`, and say what comes next.

    ValueError leaves nothing behind.
    """
    if ALLOCATION in os.environ:
        raise ValueError(
            f"this is inside of job {os.environ[ALLOCATION]}, and a sweep is a job of its own; "
            f"unset {ALLOCATION} to submit it, or set launch=local"
        )
    _refuse_without_slurm()
    with _folders() as made:
        places = [made(job.folder) for job in jobs]
        batch = Batch(
            name=folder.name, folder=made(folder), places=places, is_array=True, at_once=at_once
        )
        number = _handed_over(spec, jobs, batch)
    limit = f", {at_once} at a time" if at_once else ""
    print(
        "\n".join(
            [
                f"submitted job {number}: {len(jobs)} run(s) of {_size(spec)}, {folder}{limit}",
                *(f"  {number}_{task}  {job.folder.name}" for task, job in enumerate(jobs)),
                *_told(spec, number, batch),
            ]
        )
    )


def _refuse_without_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm needs the command sbatch, which is not on the path; submit on a "
            "login node of the cluster, or look at the script with dry_run=true"
        )


def _handed_over(spec: "SlurmSpec", jobs: Sequence[Job], batch: Batch) -> str:
    """Write everything that a batch needs, and return the number that Slurm gave it."""
    for job, place in zip(jobs, batch.places, strict=True):
        hand_over(
            place, job, nodes=spec.nodes, processes=spec.node_processes,
            restarts=spec.max_restarts(spec.world_size), watchdog=spec.watchdog,
        )  # fmt: skip
    batch.script.write_text(render(spec, batch))
    if ALLOCATION in os.environ:
        _become(batch.script)
    return _submit(batch.script)


def _size(spec: "SlurmSpec") -> str:
    return f"{spec.nodes} node(s) x {spec.node_processes} process(es)"


def _told(spec: "SlurmSpec", number: str, batch: Batch) -> list[str]:
    """Return what a user does next."""
    log = Path(batch.log.replace("%j", number).replace("%A", number))
    limit = f"the limit of {spec.time}" if spec.time else "the limit of its partition"
    then = "Slurm queues it again, and it goes on" if spec.requeue else "the job is over"
    one, again = "", f"sbatch {shlex.quote(str(batch.script))}"
    logs = shlex.quote(str(log))
    if batch.is_array:
        logs = f"{shlex.quote(str(log.parent))}/{log.name.replace('%a', '*')}"
        one = f", or scancel {number}_0 for one"
        again = "the same command: what is queued, what has failed once more, and the table"
    return [
        f"  log     tail -F {logs}",
        f"  state   squeue --job {number}",
        f"  cancel  scancel {number}{one}    (it saves first, where the cluster leaves it time)",
        f"  limit   {spec.signal_seconds} s before {limit} it saves and ends with 75; {then}",
        f"  again   {again}",
    ]


@contextmanager
def _folders() -> Iterator[Callable[[Path], Path]]:
    """Yield what makes jobs/NNN in a folder; a submission that is refused leaves none of them."""
    from trainer.directory import new_numbered

    all_made: list[Path] = []

    def made(folder: Path) -> Path:
        all_made.append(new_numbered(folder, "jobs").absolute())
        return all_made[-1]

    try:
        yield made
    except ValueError:
        for place in all_made:
            shutil.rmtree(place)
            with suppress(OSError):  # something else is in there
                place.parent.rmdir()
                place.parent.parent.rmdir()
        raise


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
