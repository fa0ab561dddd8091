"""`tessera sweep`: every combination of some settings as a run of its own, and one table."""

import os
import re
from pathlib import Path

from launch.compose import parsed
from launch.exit_codes import CHECK_FAILED, FINISHED, PREEMPTED
from launch.signals import leaving_on_signals
from launch.sweep_plan import SweepJob, plan
from launch.sweep_runner import DEVICES, SweepRunner
from launch.sweep_table import record, results, table
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
  jobs=1                  how many at a time; GPUs are shared out among them
  stop_on_failure=false   true: start no more once one has failed
  dry_run=false           true: check and list, start nothing
"""
OPTIONS = {"sweep": "", "jobs": "1", "stop_on_failure": "false", "dry_run": "false"}
RESULTS, LOGS = "sweep.json", "logs"


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
    slots = _count(options["jobs"])
    runs, base, overrides = _base(overrides)
    name = options["sweep"] or f"{base}-sweep"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"sweep={name!r} is no folder name; set sweep to letters, digits, '.', '_' and '-'"
        )
    folder = runs / name
    with leaving_on_signals():
        jobs = plan(overrides, base, folder)
        devices = _devices(slots, max(job.processes for job in jobs))
    if is_dry:
        print("\n".join(_listed(jobs)))
        return FINISHED
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


def _listed(jobs: list[SweepJob]) -> list[str]:
    states = {True: "finished", False: "to run"}
    lines = [f"{states[job.is_finished]:<8}  {job.name}" for job in jobs]
    waiting = sum(not job.is_finished for job in jobs)
    return [*lines, f"# {len(jobs)} jobs checked, {waiting} to run; nothing was started"]


def _run(jobs: list[SweepJob], folder: Path, runner: SweepRunner, *, stop_on_failure: bool) -> int:
    waiting = [job for job in jobs if not job.is_finished]

    def tell(text: str) -> None:
        say(text)
        if folder.is_dir():  # also half way: whoever looks in sees what there is
            record(folder / RESULTS, results(jobs, runner.codes))

    if done := len(jobs) - len(waiting):
        tell(f"{done} of {len(jobs)} jobs have finished before")
    runner.run(waiting, stop_on_failure=stop_on_failure, tell=tell)
    rows = results(jobs, runner.codes)
    record(folder / RESULTS, rows)
    print("\n".join(["", *table(rows), "", f"{folder / RESULTS}"]), flush=True)
    codes = {row["exit_code"] for row in rows} - {FINISHED}
    if runner.signals or codes == {PREEMPTED}:
        tell(f"stopped; the same command goes on from here (exit code {PREEMPTED})")
        return PREEMPTED
    return CHECK_FAILED if codes else FINISHED
