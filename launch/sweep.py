"""`tessera sweep`: every combination of some settings as a run of its own, and one table."""

import os
import re
from pathlib import Path

from launch.compose import parsed
from launch.exit_codes import CHECK_FAILED, FINISHED, PREEMPTED
from launch.signals import leaving_on_signals
from launch.slurm import SlurmSpec
from launch.sweep_plan import SweepJob, listed, plan
from launch.sweep_runner import DEVICES, SweepRunner
from launch.sweep_slurm import preview, run_on_slurm
from launch.sweep_table import conclude, record, results, table
from launch.terminal import say
from launch.truth import truth
from launch.words import split_off

USAGE = """usage: tessera sweep [experiment=NAME] KEY=A,B[,..] [key=value] ... [option=value] ...

  tessera sweep experiment=demo optim.lr=1e-3,3e-4 seed=0,1    four runs in runs/demo-sweep/

Commas are read as Hydra's sweeps read them: KEY=A,B varies; KEY=[a,b] and KEY="a,b" are one value;
choice(a,b), range(1,4) and, of groups, glob(*) vary too. All jobs are checked before the first
starts. The same command again goes on with what has not finished. At the end: a table, the best
first, which also lies in runs/SWEEP/sweep.json.

  sweep=NAME              the folder below runs (default: the name of the run, and -sweep)
  jobs=N                  how many at a time (default: 1, and GPUs are shared out among them; with
                          launch=slurm as many as the cluster has nodes for)
  stop_on_failure=false   true: start no more once one has failed
  dry_run=false           true: check and list, start nothing

With launch=slurm the jobs are one array, and the command ends once Slurm has it. The same command
says what is queued or running, submits what is neither that nor finished, and shows the table.
"""
OPTIONS = {"sweep": "", "jobs": "", "stop_on_failure": "false", "dry_run": "false"}
LOGS = "logs"


def main(arguments: list[str]) -> int:
    """Run `tessera sweep` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    if "RANK" in os.environ:
        raise ValueError("a sweep starts processes itself; run it without torchrun, or unset RANK")
    given, overrides = split_off("sweep", arguments, OPTIONS)
    options = {**OPTIONS, **given}
    stop_on_failure = truth("stop_on_failure", options["stop_on_failure"])
    is_dry = truth("dry_run", options["dry_run"])
    at_once = _count(options["jobs"]) if options["jobs"] else None
    slots = at_once or 1
    runs, base, overrides = _base(overrides)
    name = options["sweep"] or f"{base}-sweep"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"sweep={name!r} is no folder name; set sweep to letters, digits, '.', '_' and '-'"
        )
    folder = runs / name
    with leaving_on_signals():
        jobs = plan(overrides, base, folder)
        spec = jobs[0].launch
        if isinstance(spec, SlurmSpec):
            if stop_on_failure:
                raise ValueError(
                    "stop_on_failure=true has no effect on Slurm, which starts the jobs itself; "
                    "leave it out"
                )
            if not is_dry:
                return run_on_slurm(jobs, spec, folder, at_once)
            print(preview(jobs, spec, folder, at_once), end="")
            return _list(jobs)
        devices = _devices(slots, max(job.launch.world_size for job in jobs))
    if is_dry:
        return _list(jobs)
    return _run(
        jobs, folder, SweepRunner(slots, folder / LOGS, devices), stop_on_failure=stop_on_failure
    )


def _base(overrides: list[str]) -> tuple[Path, str, list[str]]:
    """Return the parent folder, the name that the jobs' begin with, and the words that are left."""
    own = {"runs": "runs", "name": "", "experiment": ""}
    for word in overrides:
        key, _, value = word.partition("=")
        if key in own and value:
            own[key] = str(parsed(word)[1]) if key != "experiment" else value
    words = [word for word in overrides if word.partition("=")[0] not in ("runs", "name")]
    several = "," in own["experiment"] or "(" in own["experiment"]
    name = own["name"] or ("" if several else own["experiment"]) or "run"
    return Path(own["runs"]).expanduser(), name, words


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"jobs={text} is no number of jobs; set it to 1 or more")
    return int(text)


def _devices(slots: int, processes: int) -> list[str]:
    """Return the GPUs to share out; none where all jobs in turn may have all."""
    if slots == 1:
        return []
    import torch

    count = torch.cuda.device_count()
    if count and slots * processes > count:
        raise ValueError(
            f"jobs={slots} of launch.processes={processes} need {slots * processes} GPUs, this "
            f"machine has {count}; set jobs to {max(1, count // processes)} or less"
        )
    given = os.environ.get(DEVICES)
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def _list(jobs: list[SweepJob]) -> int:
    """Say how each job stands, and what those that were started came to."""
    rows = results(jobs, {})
    if any(row["steps"] for row in rows):
        print("\n".join([*table(rows), ""]))
    waiting = sum(job.is_waiting for job in jobs)
    count = f"# {len(jobs)} jobs checked, {waiting} to run; nothing was started"
    print("\n".join([*listed(jobs), count]))
    return FINISHED


def _run(jobs: list[SweepJob], folder: Path, runner: SweepRunner, *, stop_on_failure: bool) -> int:
    waiting = [job for job in jobs if job.is_waiting]

    def tell(text: str) -> None:
        say(text)
        if folder.is_dir():  # also half way: whoever looks in sees what there is
            record(folder, results(jobs, runner.codes))

    if done := len(jobs) - len(waiting):
        tell(f"{done} of {len(jobs)} jobs have finished before")
    runner.run(waiting, stop_on_failure=stop_on_failure, tell=tell)
    rows = results(jobs, runner.codes)
    conclude(folder, rows)
    codes = {row["exit_code"] for row in rows} - {FINISHED}
    if runner.signals or codes == {PREEMPTED}:
        tell(f"stopped; the same command goes on from here (exit code {PREEMPTED})")
        return PREEMPTED
    return CHECK_FAILED if codes else FINISHED
