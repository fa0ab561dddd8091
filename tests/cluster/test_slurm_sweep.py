"""A sweep on a real Slurm: one array, of which tasks are stopped, queued again, submitted anew.

`bash tests/cluster/run.sh` installs Slurm where it may and runs this.
"""

import json
import re
from pathlib import Path

from launch.exit_codes import FINISHED
from tests.cluster import test_slurm
from tests.cluster.submitted import MAX_STEPS, NODES, Cluster, Submitted
from tests.launch.test_supervisor import curve

pytestmark = test_slurm.pytestmark
STEPS = 4 * MAX_STEPS
WORDS = ("seed=0,1,2", "sweep=seeds", "name=tiny", f"max_steps={STEPS}", *NODES)


def sweep(cluster: Cluster, *words: str) -> str:
    done = cluster.train(*WORDS, *words, command="sweep")
    assert done.returncode == FINISHED, done.stderr
    return done.stdout


def submitted_in(told: str) -> list[tuple[str, str]]:
    """Return (number, name) of each task that was submitted."""
    return re.findall(r"^  (\d+_\d+)  (\S+)$", told, re.MULTILINE)


def test_stopped_task_is_queued_again_alone_and_the_same_command_submits_what_is_missing(
    cluster: Cluster, whole: Path
) -> None:
    folder = cluster.folder / "seeds"
    told = submitted_in(sweep(cluster, "jobs=3", "launch.options=[--hold]"))
    assert [name for _, name in told] == [f"tiny-seed_{seed}" for seed in range(3)]
    tasks = [Submitted(cluster=cluster, number=n, run=folder / name) for n, name in told]
    number = tasks[0].number.partition("_")[0]
    assert "ArrayTaskThrottle=3" in cluster.ask("scontrol", "show", "job", number)
    assert sweep(cluster).splitlines() == [f"pending as {n}  {name}" for n, name in told]
    cluster.ask("scontrol", "release", number)
    for task in tasks:
        task.until_steps(5)
    assert tasks[2].value("JobId") == number  # also that of the array, of which only it is stopped
    cluster.ask("scancel", "--batch", "--signal=USR1", tasks[2].number)
    tasks[1].cancel()
    tasks[2].until(lambda: f"queued again as job {number}_2" in tasks[2].log)
    tasks[1].until(lambda: tasks[1].value("JobState") == "CANCELLED")
    ((missing, name),) = submitted_in(sweep(cluster))
    assert name == "tiny-seed_1"
    for task in (tasks[0], tasks[2], Submitted(cluster=cluster, number=missing, run=tasks[1].run)):
        task.until_state("COMPLETED")
    assert [task.value("Restarts") for task in tasks] == ["0", "0", "1"]
    assert curve(tasks[0].run)[:MAX_STEPS] == curve(whole)
    table = sweep(cluster).splitlines()
    assert [line.split()[-1] for line in table[2:5]] == [str(FINISHED)] * 3
    rows = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert [row["steps"] for row in rows] == [STEPS] * 3
    for start in ("001", "002"):
        record = json.loads((tasks[2].run / "attempts" / start / "command.json").read_text())
        assert {"seed=2", "launch=slurm"} <= set(record["words"])
