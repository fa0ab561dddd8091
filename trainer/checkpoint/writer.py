"""The process that writes a rank's part of a checkpoint while training goes on.

Standard library and xxhash only: it starts in a fraction of a second, shares no interpreter lock
with training, and fault sweeps can kill it at every system call. `background.Writer` starts it.
"""

import json
import mmap
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from trainer.checkpoint.commit import commit, step_folder
from trainer.checkpoint.lock import check_generation
from trainer.checkpoint.retention import tidy
from trainer.checkpoint.writing import (
    READY,
    collect_parts,
    publish_parts,
    refuse_link,
    stage,
    wait_until,
    write_parts,
)
from trainer.errors import StorageError
from trainer.files import fsync_file
from trainer.parent_death import die_with
from trainer.sizes import on_disk

NICENESS = 10  # training comes first where cores are few


class Commit(NamedTuple):
    """What rank 0 does besides writing its part."""

    sizes: dict[str, int]
    """Bytes of every file of the checkpoint, by its name within."""
    facts: dict[str, Any]
    """What the manifest says beside the files."""
    num_others: int
    """Ranks that write a part, too."""
    run: str
    """Folder of the lock."""
    generation: int
    keep: int
    best_step: int | None


class Job(NamedTuple):
    """One rank's part of a save."""

    parent: str
    """Folder of all steps."""
    staging: str
    """Name of the folder to write to."""
    step: int
    rank: int
    num_bytes: int
    """Bytes of shared memory that hold the part."""
    ranges: dict[str, list[tuple[int, int, int]]]
    """(offset in the file, start and stop in the shared memory) by file."""
    appended: list[str]
    """Files to make durable first: a checkpoint refers to their lines."""
    commit: Commit | None
    """On rank 0 alone."""


class Result(NamedTuple):
    """How a part ended; of rank 0's part, how the save did."""

    seconds: float = 0.0
    error: str = ""
    """What failed, with its path and reason; empty: nothing."""
    warning: str = ""
    """What failed after the commit: nothing is lost."""


def perform(job: Job, memory: memoryview) -> str:
    """Write the part; on rank 0 also commit the step. Return the warning of a Result.

    OSError or StorageError where the step was not committed.
    """
    parent = Path(job.parent)
    staging = parent / job.staging
    if job.commit:
        stage(parent, job.staging, job.commit.sizes)
    else:
        refuse_link(parent)
        wait_until((staging / READY).exists)
    for path in job.appended:
        fsync_file(Path(path))
    parts = []
    for name, ranges in job.ranges.items():
        own = ((offset, memory[start:stop]) for offset, start, stop in ranges)
        parts += write_parts(staging / name, name, own)
    if job.commit is None:
        publish_parts(staging, job.rank, parts)
        return ""
    lead = job.commit
    parts += collect_parts(staging, lead.num_others)
    commit(
        staging,
        step_folder(parent, job.step),
        {"step": job.step, "generation": lead.generation, **lead.facts},
        parts,
        lambda: check_generation(Path(lead.run), lead.generation),
    )
    try:
        tidy(parent, job.step, lead.keep, lead.best_step)
    except OSError as error:
        return explain(error, parent)
    return ""


def explain(error: OSError | StorageError, parent: Path) -> str:
    """Return what failed, where, and how much space there is."""
    if isinstance(error, StorageError):
        return str(error)
    return f"{error.filename or parent}: {error.strerror} ({on_disk(free_bytes(parent))} free)"


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not be there yet."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free


def answer(job: Job, descriptor: int) -> Result:
    """Perform a job whose bytes lie in the shared memory of `descriptor`."""
    try:
        with (
            mmap.mmap(descriptor, job.num_bytes, access=mmap.ACCESS_READ) as memory,
            memoryview(memory) as view,
        ):
            return _result(job, view)
    except OSError as error:
        return Result(error=explain(error, Path(job.parent)))


def _result(job: Job, memory: memoryview) -> Result:
    """Perform a job. An error ends here: the calls that it names hold slices of the memory, which
    cannot be closed as long as there is one."""
    started = time.monotonic()
    try:
        warning = perform(job, memory)
        return Result(seconds=time.monotonic() - started, warning=warning)
    except (OSError, StorageError) as error:
        return Result(error=explain(error, Path(job.parent)))


def job_from(fields: list[Any]) -> Job:
    """Return what `json.dumps(job)` wrote: JSON knows no names of tuples."""
    job = Job(*fields)
    return job._replace(commit=Commit(*job.commit) if job.commit else None)


def main() -> None:
    """Take one job per line until the rank that started this process is gone."""
    memory, parent = map(int, sys.argv[1:])
    if not die_with(parent):
        return
    os.nice(NICENESS)
    for line in sys.stdin:
        number, fields = json.loads(line)
        print(json.dumps([number, *answer(job_from(fields), memory)]), flush=True)
