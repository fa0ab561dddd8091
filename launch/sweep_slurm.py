"""A sweep on Slurm: what has not finished, and is not queued, becomes one job array."""

from pathlib import Path

from launch.exit_codes import FINISHED
from launch.sbatch import Batch, render
from launch.slurm import SlurmSpec
from launch.submission import submit_array
from launch.sweep_plan import SweepJob, listed
from launch.sweep_table import conclude, results


def run_on_slurm(jobs: list[SweepJob], spec: SlurmSpec, folder: Path, at_once: int | None) -> int:
    """Submit what waits, say how the others stand, show what there is; 0: Slurm has or had all."""
    waiting = [job for job in jobs if job.is_waiting]
    others = [job for job in jobs if not job.is_waiting]
    if waiting:
        submit_array(spec, [job.job for job in waiting], folder, at_once)
    if any(job.queued for job in others):
        print("\n".join(listed(others)))
    rows = results(jobs, {})
    if any(row["steps"] for row in rows):
        conclude(folder, rows)
    return FINISHED


def preview(jobs: list[SweepJob], spec: SlurmSpec, folder: Path, at_once: int | None) -> str:
    """Return the script that would be submitted; empty: nothing would."""
    places = [job.folder.absolute() / "jobs" / "NNN" for job in jobs if job.is_waiting]
    batch = Batch(
        name=folder.name, folder=folder.absolute() / "jobs" / "NNN", places=places,
        is_array=True, at_once=at_once,
    )  # fmt: skip
    return f"# {batch.script}:\n{render(spec, batch)}" if places else ""
