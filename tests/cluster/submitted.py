"""A Slurm of these tests, and jobs that were submitted to it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.exit_codes import FINISHED
from tests.launch.test_supervisor import TINY, command_line, ledger

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

    def train(
        self, *words: str, before: tuple[str, ...] = (), command: str = "train"
    ) -> subprocess.CompletedProcess[str]:
        """Run `tessera train` to its end, or another command."""
        settings = [*TINY, f"runs='{self.folder}'", f"data.cache={self.cache}", *words]
        return subprocess.run(
            [*before, sys.executable, "-m", "launch", command, *settings],
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
    """A job of one run, or the task of an array: 17_3."""

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
        folder = self.run.parent if "_" in self.number else self.run
        return "".join(path.read_text() for path in folder.glob(f"jobs/*/{self.number}.log"))

    @property
    def conf(self) -> str:
        """Of this Slurm: on another one of this machine a job may have the same number."""
        return self.cluster.variables["SLURM_CONF"]

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
        """Return the processes of this run that run a module; srun only has it among its words."""
        pids = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
        words = {pid: command_line(pid) for pid in pids}
        found = [pid for pid, line in words.items() if module in line and line[:5] != b"srun\0"]
        return [pid for pid in found if self._is_mine(pid)]

    def _is_mine(self, pid: int) -> bool:
        try:
            around = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        marks = {"SLURM_JOB_ID": self.value("JobId"), "SLURM_CONF": self.conf}
        return all(f"{key}={value}\0".encode() in around for key, value in marks.items())

    def cancel(self) -> None:
        self.cluster.ask("scancel", self.number)
