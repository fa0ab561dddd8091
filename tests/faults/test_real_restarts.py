"""The real command: ranks that are killed, stopped, or out of step, and a job's limit of time.

Slow: each start imports torch in two processes. Run them alone, on a quiet machine:
`bash tests/run.sh -m slow tests/faults/test_real_restarts.py -s`
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import FINISHED, INTERNAL, PREEMPTED
from tests.conftest import Figure
from tests.faults.injected import WORKER, Fault, prepare
from tests.launch.test_supervisor import Command, curve, ledger, started, until
from trainer.checkpoint.commit import committed_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LIMIT_SECONDS = 300.0
RECOVERY_SECONDS = 10.0  # on 2 cores with nothing else on them
FOUND_SECONDS, STOPPED_SECONDS = 7.0, 20.0
WORDS = ("launch.processes=2", "save_every=10", "max_steps=400")
BACK = re.compile(r"tessera: back at work after ([0-9.]+) s: step (\d+) is done")


def back_after(command: Command) -> float:
    """Return the seconds that the command says it took to come back."""
    found: list[Any] = []

    def has_come_back() -> bool:
        found[:] = BACK.findall(command.text)
        return bool(found) or command.process.poll() is not None

    until(has_come_back, LIMIT_SECONDS)
    assert found, command.text
    return float(found[0][0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that nobody disturbed."""
    with started(tmp_path_factory.mktemp("whole"), cache, *WORDS) as command:
        assert command.wait(LIMIT_SECONDS) == FINISHED, command.text
    return command.run


def test_run_whose_rank_is_killed_comes_back_by_itself_with_the_same_numbers(
    whole: Path, tmp_path: Path, cache: Path, figure: Figure
) -> None:
    with started(tmp_path, cache, *WORDS) as command:
        until(lambda: len(ledger(command.run)) > 25, LIMIT_SECONDS)
        os.kill(command.workers()[1], signal.SIGKILL)
        seconds = back_after(command)
        assert command.wait(LIMIT_SECONDS) == FINISHED, command.text
    figure("A1 one killed rank of `tessera train`: from its end to the next step", seconds, "s")
    assert curve(command.run) == curve(whole)
    assert "tessera: rank 1 of 2 failed first in step " in command.text
    assert len(re.findall(r"^model ", command.text, re.MULTILINE)) == 1
    assert len(re.findall(r"^start +2 goes on after step \d+$", command.text, re.MULTILINE)) == 1
    assert command.text.splitlines()[-1].startswith("tessera: finished after 1 restart; steps ")
    assert seconds < RECOVERY_SECONDS


def test_stopped_rank_is_named_within_seconds_and_the_run_comes_back(
    whole: Path, tmp_path: Path, cache: Path, figure: Figure
) -> None:
    with started(tmp_path, cache, *WORDS) as command:
        until(lambda: len(ledger(command.run)) > 25, LIMIT_SECONDS)
        os.kill(command.workers()[1], signal.SIGSTOP)
        start = time.monotonic()
        found = until(lambda: "did not arrive" in command.text, LIMIT_SECONDS)
        back_after(command)
        seconds = time.monotonic() - start
        assert command.wait(LIMIT_SECONDS) == FINISHED, command.text
    figure("A12 a stopped rank: until it is named", found, "s")
    figure("A12 a stopped rank: until the next step", seconds, "s")
    assert curve(command.run) == curve(whole)
    assert "rank 1 of 2 did not arrive: it is stopped (SIGSTOP) in step " in command.text
    stacks = sorted((command.run / "attempts" / "001").glob("stacks.*.txt"))
    assert [path.name for path in stacks] == ["stacks.00000.txt", "stacks.00001.txt"]
    assert all("loop.py" in path.read_text() for path in stacks)
    assert found < FOUND_SECONDS
    assert seconds < STOPPED_SECONDS


def test_run_ends_by_itself_before_its_slurm_job_does(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    end = time.time() + 60.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(end)))
    with started(tmp_path, cache, "launch.processes=2", "max_steps=1000000") as command:
        assert command.wait(LIMIT_SECONDS) == PREEMPTED, command.text
    figure("A11 a run in a Slurm job: before its end", end - time.time(), "s")
    assert time.time() < end - 2.0  # the script of the job has its own work to do
    step = committed_steps(command.run / "checkpoints")[0]
    assert step == max(line["step"] for line in ledger(command.run))
    assert f"stopped by its time limit; last committed step: {step};" in command.text


@pytest.mark.parametrize("kind", ["additional collective", "skipped collective"])
def test_collectives_that_do_not_match_are_told_of_both_ranks(
    tmp_path: Path, cache: Path, kind: str
) -> None:
    attempt = tmp_path / "runs" / "tiny" / "attempts" / "001"
    prepare(attempt, cache, Fault(kind=kind, phase="log"), timeout_seconds=600.0)
    code = (
        "import sys, pathlib; from launch.supervisor import Supervisor; "
        "from launch.watchdog import WatchdogSpec; sys.exit(Supervisor("
        f"2, pathlib.Path({str(attempt)!r}), {WORKER!r}, "
        "watchdog=WatchdogSpec(step_seconds=3, floor_seconds=3)).run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == INTERNAL, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "rank 0" in last
    assert "rank 1" in last
    assert "in step 3 (log)" in last
    assert "all_reduce of" in last or "gloo or NCCL: the collectives did not match" in last
