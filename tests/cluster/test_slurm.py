"""Runs on a real Slurm with two nodes: they end, are stopped, come again, and compute the same.

`bash tests/cluster/run.sh` installs Slurm where it may and runs this.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.exit_codes import BAD_CONFIG, FINISHED
from tests.cluster.mini_slurm import is_installed, mini_slurm
from tests.launch.test_supervisor import TINY, check_saved, command_line, curve, ledger
from trainer.checkpoint.commit import committed_steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_installed(), reason="needs root, and slurm-wlm and munge installed"),
]
MAX_STEPS = int(os.environ.get("TESSERA_CLUSTER_STEPS", "200"))
"""A busy machine has time for fewer: 50 are enough to be ended on the way."""
LIMIT_SECONDS = 400.0
NODES = ("launch=slurm", "launch.nodes=2")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Slurm, and where runs on it write."""

    variables: dict[str, str]
    folder: Path
    cache: Path

    def ask(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.variables, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def train(self, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run `tessera train` to its end."""
        settings = [*TINY, f"runs='{self.folder}'", f"data.cache={self.cache}", *words]
        return subprocess.run(
            [*before, sys.executable, "-m", "launch", "train", *settings],
            env=self.variables, capture_output=True, text=True, check=False,
            timeout=LIMIT_SECONDS, cwd=self.folder,
        )  # fmt: skip

    def submit(self, name: str, *words: str) -> "Submitted":
        done = self.train(f"name={name}", *NODES, *words)
        assert done.returncode == FINISHED, done.stderr
        found = re.match(r"submitted job (\d+): 2 node\(s\) x 1 process\(es\)", done.stdout)
        assert found, done.stdout
        return Submitted(cluster=self, number=found[1], run=self.folder / name)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job of one run."""

    cluster: Cluster
    number: str
    run: Path

    def value(self, key: str) -> str:
        """Return what Slurm says of the job under a name, for example JobState."""
        shown = self.cluster.ask("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{key}=(\S+)", shown)
        assert found, shown
        return found[1]

    @property
    def log(self) -> str:
        path = self.run / "jobs" / "001" / f"{self.number}.log"
        return path.read_text() if path.exists() else ""

    def until(self, condition: Callable[[], bool]) -> None:
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < LIMIT_SECONDS, self.log[-3000:]
            time.sleep(0.1)

    def until_state(self, state: str) -> None:
        def is_there() -> bool:
            found = self.value("JobState")
            assert found in (state, "PENDING", "RUNNING", "COMPLETING"), found + self.log[-3000:]
            return found == state

        self.until(is_there)

    def until_steps(self, count: int) -> None:
        path = self.run / "ledger" / "rank00000.jsonl"
        self.until(lambda: path.exists() and len(ledger(self.run)) >= count)

    def processes(self, module: bytes) -> list[int]:
        """Return the processes of this run that run a module."""
        pids = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
        return [pid for pid in pids if module in command_line(pid) and self._is_mine(pid)]

    def _is_mine(self, pid: int) -> bool:
        try:
            around = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"SLURM_JOB_ID={self.number}\0".encode() in around

    def cancel(self) -> None:
        self.cluster.ask("scancel", self.number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    runs = folder / "runs of a user"  # a path that wants quotes
    runs.mkdir()
    root = str(Path(__file__).parents[2])
    with mini_slurm(folder / "daemons") as variables:
        around = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        yield Cluster(variables=around, folder=runs, cache=cache)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """The folder of a run on two processes of this machine, without Slurm."""
    done = cluster.train("name=whole", f"max_steps={MAX_STEPS}", "launch.processes=2")
    assert done.returncode == FINISHED, done.stderr
    return cluster.folder / "whole"


def test_run_on_two_nodes_has_the_bits_of_two_processes(cluster: Cluster, whole: Path) -> None:
    job = cluster.submit("two", f"max_steps={MAX_STEPS}", "launch.time=01:00:00")
    job.until_state("COMPLETED")
    assert curve(job.run) == curve(whole)
    assert not job.processes(b"launch.worker")
    check_saved(job.run, MAX_STEPS)
    said = [line for line in job.log.splitlines() if line.startswith("tessera: ")]
    assert not [line for line in said if "submitted with the code of" not in line]


def test_job_told_of_its_limit_saves_is_queued_again_and_goes_on(
    cluster: Cluster, whole: Path
) -> None:
    """Slurm's own signal, which the batch script gets as `--signal=B:USR1@..` does."""
    job = cluster.submit("told", f"max_steps={MAX_STEPS}")
    job.until_steps(15)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    job.until_state("COMPLETED")
    assert job.value("Restarts") == "1"
    assert curve(job.run) == curve(whole)
    steps = [line["step"] for line in ledger(job.run)]
    assert steps == list(range(1, MAX_STEPS + 1))  # the last step was saved: none came twice
    assert "stopped by SIGUSR1; last committed step: " in job.log
    assert f"queued again as job {job.number}" in job.log
    assert sorted(each.name for each in (job.run / "attempts").iterdir()) == ["001", "002"]


def test_limit_of_time_queues_a_job_again_and_scancel_ends_it_saved(cluster: Cluster) -> None:
    words = ("max_steps=1000000", "save_every=null", "launch.time=00:03:00")
    job = cluster.submit("limit", *words, "launch.signal_seconds=60")
    # Nothing else saves. A busy machine may be stopped before its first step at first.
    job.until(lambda: bool(committed_steps(job.run / "checkpoints")))
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=01:00:00")
    first = committed_steps(job.run / "checkpoints")[0]
    assert re.search(r"stopped by (SIGUSR1|its time limit); last committed step: \d", job.log)
    job.until_steps(first + 15)
    restarts = job.value("Restarts")
    assert int(restarts) >= 1
    workers = job.processes(b"launch.worker")
    assert len(workers) == 2
    job.cancel()
    job.until_state("CANCELLED")
    job.until(lambda: not job.processes(b"launch"))
    last = ledger(job.run)[-1]["step"]
    check_saved(job.run, last)
    assert last >= first + 15
    steps = [line["step"] for line in ledger(job.run)]
    assert steps == list(range(1, last + 1))
    assert re.search(r"stopped by SIG(TERM|USR1); last committed step: \d", job.log)
    assert job.value("Restarts") == restarts


@pytest.mark.parametrize("node", [0, 1])
def test_killed_launcher_of_a_node_queues_the_job_again(
    cluster: Cluster, whole: Path, node: int
) -> None:
    job = cluster.submit(f"killed-{node}", f"max_steps={MAX_STEPS}", "save_every=10")
    job.until_steps(25)
    for pid in job.processes(b"launch.node"):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"SLURM_PROCID={node}".encode() in variables:
            os.kill(pid, signal.SIGKILL)
    job.until_state("COMPLETED")
    assert job.value("Restarts") == "1"
    assert f"node {node} of 2 is lost: its launcher has ended" in job.log
    assert curve(job.run) == curve(whole)


def test_job_that_is_refused_by_slurm_is_one_line_and_leaves_nothing(cluster: Cluster) -> None:
    for words, reason in (
        (("launch.partition=night",), "launch.partition=night is no partition of this cluster"),
        (("launch.gpus=1",), "Slurm did not take the job: "),
    ):
        done = cluster.train("name=refused", *NODES, *words)
        assert done.returncode == BAD_CONFIG, done.stderr
        (line,) = done.stderr.splitlines()
        assert reason in line
    assert not (cluster.folder / "refused").exists()


def test_bad_config_of_a_queued_job_is_told_and_not_queued_again(cluster: Cluster) -> None:
    job = cluster.submit("held", "max_steps=50", "launch.options=[--hold]")
    shutil.rmtree(job.run / "jobs" / "001" / "config.yaml", ignore_errors=True)
    (job.run / "jobs" / "001" / "config.yaml").write_text("[]")
    cluster.ask("scontrol", "release", job.number)
    job.until_state("FAILED")
    assert job.value("ExitCode") == f"{BAD_CONFIG}:0"
    assert job.value("Restarts") == "0"
    assert job.log.count("config.yaml holds no keys") == 1


def test_edit_of_the_config_after_submission_changes_no_queued_job(cluster: Cluster) -> None:
    """What the job trains lies in its folder: neither Hydra nor the YAML files are asked again."""
    job = cluster.submit("queued", "max_steps=3", "launch.options=[--hold]")
    stored = (job.run / "jobs" / "001" / "config.yaml").read_text()
    cluster.ask("scontrol", "release", job.number)
    job.until_state("COMPLETED")
    assert (job.run / "attempts" / "001" / "config.yaml").read_text() == stored
    assert "configs" not in (job.run / "jobs" / "001" / "job.sh").read_text()


def test_command_inside_of_an_allocation_trains_in_it(cluster: Cluster, whole: Path) -> None:
    words = ("name=inside", f"max_steps={MAX_STEPS}", *NODES)
    done = cluster.train(*words, before=("salloc", "--nodes=2", "--quiet"))
    assert done.returncode == FINISHED, done.stderr
    assert curve(cluster.folder / "inside") == curve(whole)
    done = cluster.train("launch=slurm", before=("salloc", "--nodes=2", "--quiet"))
    assert done.returncode == BAD_CONFIG
    assert "launch.nodes=1, but this is inside of job " in done.stderr
