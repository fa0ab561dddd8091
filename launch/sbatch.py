"""The batch script of `launch=slurm`: what a user would write by hand, with comments.

It starts one launcher on each node, and knows nothing of the config: that lies beside it.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.exit_codes import PREEMPTED
from launch.group import safe_paths

if TYPE_CHECKING:
    from launch.slurm import SlurmSpec

SCRIPT = "job.sh"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one script starts: a run, or each of several as a task of an array."""

    name: str
    folder: Path
    """Where the script lies, and what Slurm writes."""
    places: Sequence[Path]
    """Where each run was handed over."""
    is_array: bool = False
    at_once: int | None = None
    """How many tasks may run at a time; None: as many as Slurm has nodes for."""

    @property
    def script(self) -> Path:
        return self.folder / SCRIPT

    @property
    def log(self) -> str:
        """Where Slurm writes, in its own pattern."""
        return str(self.folder / ("%A_%a.log" if self.is_array else "%j.log"))


def render(spec: "SlurmSpec", batch: Batch) -> str:
    """Return the script, readable and complete."""
    command, configs = ("sweep", "configs lie") if batch.is_array else ("train", "config lies")
    where = "in their runs" if batch.is_array else "beside it"
    lines = [
        "#!/bin/bash",
        f"# Written by `tessera {command} launch=slurm`; `sbatch` takes it again as it is.",
        f"# {spec.nodes} node(s) x {spec.node_processes} process(es); the {configs} {where}.",
        *_head(spec, batch),
        "",
        *_body(spec, batch),
        *_TAIL.splitlines(),
        *(_requeue(batch).splitlines() if spec.requeue else ()),
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def places_of(script: str) -> list[Path]:
    """Return where a script finds its runs, in the order of its tasks."""
    found = re.search(r"^jobs=\((.*?)^\)$|^(job=.*?)$", script, re.DOTALL | re.MULTILINE)
    words = shlex.split((found[1] or found[2]) if found else "")
    return [Path(word.removeprefix("job=")) for word in words]


def _head(spec: "SlurmSpec", batch: Batch) -> Iterator[str]:
    """Yield what sbatch reads."""
    _refuse_pattern(batch.folder)
    asked = {
        "job-name": batch.name, "nodes": spec.nodes, "ntasks-per-node": 1,
        "gpus-per-node": spec.gpus, "cpus-per-task": spec.cpus, "mem": spec.memory,
        "time": spec.time, "partition": spec.partition, "account": spec.account,
        "qos": spec.qos, "constraint": spec.constraint, "reservation": spec.reservation,
        "chdir": os.getcwd(), "output": batch.log, "open-mode": "append",
    }  # fmt: skip
    for option, value in asked.items():
        if value is not None:
            yield f"#SBATCH --{option}={shlex.quote(str(value))}"
    if batch.is_array:
        limit = f"%{batch.at_once}" if batch.at_once else ""
        yield f"#SBATCH --array=0-{len(batch.places) - 1}{limit}"
    if spec.exclusive:
        yield "#SBATCH --exclusive"
    yield f"# So many seconds before the limit: all ranks save and end with {PREEMPTED}."
    yield f"#SBATCH --signal=B:USR1@{spec.signal_seconds}"
    yield "#SBATCH --requeue" if spec.requeue else "#SBATCH --no-requeue"
    for option in spec.options:
        key, separator, value = option.partition("=")
        yield f"#SBATCH {key}{separator}{shlex.quote(value) if value else ''}"


def _refuse_pattern(folder: Path) -> None:
    """Raise ValueError for a path in which Slurm would read something else."""
    for text in (str(folder), os.getcwd()):
        if any(letter in text for letter in "%\\\n\r"):
            raise ValueError(
                f"the path {text!r} has a '%', a backslash or a line break, which Slurm does not "
                "take literally; set runs= to another folder"
            )


def _body(spec: "SlurmSpec", batch: Batch) -> Iterator[str]:
    """Yield what runs on the first node."""
    if batch.is_array:
        yield "# The runs; each task of the array trains one."
        yield "jobs=("
        yield from (f"  {shlex.quote(str(place))}" for place in batch.places)
        yield ")"
        yield "job=${jobs[$SLURM_ARRAY_TASK_ID]}"
    else:
        yield f"job={shlex.quote(str(batch.places[0]))}"
    yield "# Of the shell that submitted: no node's number, and no port of this run."
    yield "unset NODE_RANK MASTER_PORT"
    yield from spec.setup_lines
    paths = safe_paths({}) if spec.container is None else {"PYTHONSAFEPATH": "1"}
    for variable, value in paths.items():
        rest = '"${PYTHONPATH:+:$PYTHONPATH}"' if variable == "PYTHONPATH" else ""
        yield f"export {variable}={shlex.quote(value)}{rest}"
    yield "# The launchers meet on the first node."
    yield 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    yield ""
    yield 'rm -f "$job/outcome"'
    yield "# One launcher on each node, which starts its processes."
    yield f"{' '.join(_command(spec))} &"


def _command(spec: "SlurmSpec") -> Iterator[str]:
    yield f"srun --nodes={spec.nodes} --ntasks={spec.nodes} --ntasks-per-node=1"
    yield "--kill-on-bad-exit=0 --cpu-bind=none"
    if spec.cpus:  # which srun does not take over from the job
        yield f"--cpus-per-task={spec.cpus}"
    if spec.container is not None:
        yield from _container(spec)
    python = spec.python or (sys.executable if spec.container is None else "python")
    yield f'{shlex.quote(python)} -m launch.node "$job"'


def _container(spec: "SlurmSpec") -> Iterator[str]:
    """Yield what starts the launcher within the image; it sees the run and the working folder."""
    image, mounts = shlex.quote(str(spec.container)), ",".join(spec.mounts)
    more = shlex.quote(f",{mounts}") if mounts else ""
    # job is RUN/jobs/NNN.
    seen = '"${job%/*/*}:${job%/*/*},$PWD:$PWD"' + more
    if spec.container_runtime == "pyxis":
        yield f'--container-image={image} --container-mounts={seen} --container-workdir="$PWD"'
    else:
        nv = " --nv" if spec.gpus else ""
        yield f'apptainer exec{nv} --bind {seen} --pwd "$PWD" {image}'


_TAIL = """launchers=$! cancelled=
# Near the limit: srun passes it on. SIGTERM is scancel, or the end: save, but do not come again.
# It is passed on as SIGUSR1, since srun makes a SIGKILL of SIGTERM.
trap 'kill -USR1 $launchers' USR1
trap 'cancelled=yes; kill -USR1 $launchers' TERM INT
until wait $launchers; code=$?; ! kill -0 $launchers 2>/dev/null; do :; done
# Of a launcher that was killed srun knows no more; the others have written down how it ended.
[[ -s $job/outcome ]] && code=$(<"$job/outcome")
"""


def _requeue(batch: Batch) -> str:
    """Return what queues a job again that was stopped and has saved."""
    number, way = "$SLURM_JOB_ID", "sbatch $job/job.sh"
    if batch.is_array:  # the last task has the number of the whole array, which names all of them
        number, way = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID", "the same tessera sweep"
    return f"""if [[ $code == 75 && -z $cancelled ]]; then
  echo "tessera: queued again as job {number}"
  scontrol requeue "{number}" || echo "tessera: not queued again; {way} goes on"
fi
"""
