"""Ranks that fail, hang or are killed: the run is started again where that helps, and says why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL, NO_PROGRESS, PREEMPTED
from tests.conftest import Figure
from tests.faults.plain_worker import WORKER, Plan
from trainer.checkpoint.commit import committed_steps

LIMIT_SECONDS = 150.0
# Of a step where a rank hangs; elsewhere a busy machine must not reach it.
HANG_LIMITS = {"step_seconds": 2.0, "floor_seconds": 2.0}


@dataclass(frozen=True, kw_only=True)
class Started:
    """A supervisor of two plain workers."""

    process: subprocess.Popen[bytes]
    run: Path

    def wait(self) -> int:
        return self.process.wait(LIMIT_SECONDS)

    @property
    def lines(self) -> list[str]:
        return (self.run / "output").read_text().splitlines()

    @property
    def attempts(self) -> list[str]:
        return sorted(path.name for path in (self.run / "attempts").iterdir())

    def pids(self, attempt: int = 1) -> list[int]:
        """Return the ranks' processes once both have begun a step."""
        folder = self.run / "attempts" / f"{attempt:03d}"
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            texts = [path.read_text().partition("\n")[0] for path in folder.glob("place.*.json")]
            places = [json.loads(text) for text in texts if text.endswith("}")]
            if len(places) == 2 and all(place["step"] for place in places):
                return [place["pid"] for place in places]
            time.sleep(0.02)
        raise AssertionError(self.lines)


@contextmanager
def started(
    folder: Path, plan: Plan, restarts: int = 3, words: tuple[str, ...] = (), **limits: float
) -> Iterator[Started]:
    run = folder / "run"
    attempt = run / "attempts" / "001"
    plan.write(attempt)
    watchdog = {"stopped_seconds": 1.0} | limits
    code = (
        # nohup around the tests does not count.
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "import sys, json, pathlib; from launch.supervisor import Supervisor; "
        "from launch.watchdog import WatchdogSpec; "
        f"sys.exit(Supervisor(2, pathlib.Path({str(attempt)!r}), {WORKER!r}, "
        f"restarts={restarts}, watchdog=WatchdogSpec(**{watchdog})).run())"
    )
    with open(run / "output", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Started(process=process, run=run)
    finally:
        process.kill()
        process.wait()


def is_alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def gone_after(pids: list[int]) -> float:
    """Return the seconds until none of the processes is left."""
    start = time.monotonic()
    while any(map(is_alive, pids)):
        assert time.monotonic() - start < LIMIT_SECONDS
        time.sleep(0.02)
    return time.monotonic() - start


def test_killed_rank_is_named_and_the_run_starts_again_by_itself_and_finishes(
    tmp_path: Path,
) -> None:
    with started(tmp_path, Plan(kind="kill")) as run:
        assert run.wait() == FINISHED, run.lines
    assert committed_steps(run.run / "checkpoints") == [6, 3]
    assert run.attempts == ["001", "002"]
    first, back, last = run.lines
    assert first.startswith("tessera: rank 1 of 2 failed first in step 5 (train_step): killed by ")
    assert first.endswith(
        "; last committed step: 3; steps lost: 1; starting again "
        "(restart 1 of 3 without a new checkpoint)"
    )
    assert back.startswith("tessera: back at work after ")
    assert last.startswith("tessera: finished after 1 restart; steps done twice: 1; time to rec")
    assert "; the first failure: rank 1 of 2 failed first in step 5 (train_step): kil" in last


def test_run_that_fails_at_the_same_step_again_and_again_gives_up_with_the_first_failure_first(
    tmp_path: Path,
) -> None:
    plan = Plan(kind="broken on purpose", step=2, starts=9)
    with started(tmp_path, plan, restarts=2) as run:
        assert run.wait() == NO_PROGRESS, run.lines
    assert run.attempts == ["001", "002", "003"]
    last = run.lines[-1]
    assert last.startswith("tessera: rank 1 of 2 failed first in step 2 (train_step): broken on ")
    assert "; gave up after 2 restarts without a new checkpoint, the last failure: " in last
    assert f"exit code {NO_PROGRESS} (" in last


def test_new_checkpoints_between_failures_count_as_progress(tmp_path: Path) -> None:
    plan = Plan(kind="broken on purpose", step=2, starts=2, save_every=1, moves=True)
    with started(tmp_path, plan, restarts=1) as run:
        assert run.wait() == FINISHED, run.lines
    assert run.attempts == ["001", "002", "003"]


@pytest.mark.parametrize(
    ("kind", "step", "code", "starts"),
    [
        ("bad config", 5, BAD_CONFIG, 1),
        ("out of memory", 5, INTERNAL, 2),
        ("broken on purpose", 1, INTERNAL, 1),
    ],
)
def test_run_is_not_started_again_where_the_same_would_happen(
    tmp_path: Path, kind: str, step: int, code: int, starts: int
) -> None:
    with started(tmp_path, Plan(kind=kind, step=step, starts=9)) as run:
        assert run.wait() == code, run.lines
    assert len(run.attempts) == starts
    assert f"exit code {code} (" in run.lines[-1]


def test_rank_that_leaves_early_with_zero_has_failed(tmp_path: Path) -> None:
    with started(tmp_path, Plan(kind="exit 0"), restarts=0) as run:
        assert run.wait() == INTERNAL, run.lines
    assert "rank 1 of 2 failed first in step 5 (train_step): exit code 0, and no " in run.lines[-1]


@pytest.mark.parametrize(("kind", "limits", "limit"), [("stop", {}, 1), ("hang", HANG_LIMITS, 2)])
def test_hanging_rank_is_found_by_its_limit_and_all_stacks_are_kept(
    tmp_path: Path, kind: str, limits: dict[str, float], limit: int
) -> None:
    with started(tmp_path, Plan(kind=kind), **limits) as run:
        assert run.wait() == FINISHED, run.lines  # the other rank would wait for ten minutes
    told = run.lines[0]
    assert re.search(rf"no sign of life for \d+ s \(limit of .*: {limit} s\), stacks of all ", told)
    if kind == "stop":
        assert "rank 1 of 2 did not arrive: it is stopped (SIGSTOP) in step 5 (train_step)" in told
    for rank in range(2):
        stacks = (run.run / "attempts" / "001" / f"stacks.{rank:05d}.txt").read_text()
        assert "plain_worker.py" in stacks
    assert not list((run.run / "attempts" / "002").glob("stacks.*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_to_the_supervisor_is_told_and_ends_the_run_with_its_last_step_saved(
    tmp_path: Path, number: signal.Signals
) -> None:
    with started(tmp_path, Plan(steps=1000, save_every=1000)) as run:
        pids = run.pids()
        run.process.send_signal(number)
        assert run.wait() == PREEMPTED, run.lines
        assert not any(map(is_alive, pids))
    (step,) = committed_steps(run.run / "checkpoints")
    first, last = run.lines
    assert first == (
        f"tessera: {number.name}: the run ends after this step, with a save; "
        "a second signal ends it at once"
    )
    assert last == (
        f"tessera: stopped by {number.name}; last committed step: {step}; "
        f"the same command goes on after step {step} (exit code 75)"
    )


def test_workers_end_with_a_killed_supervisor(tmp_path: Path, figure: Figure) -> None:
    with started(tmp_path, Plan(steps=1000)) as run:
        pids = run.pids()
        run.process.kill()
        seconds = gone_after(pids)
    figure("A10 a supervisor killed with signal 9: until its workers are gone", seconds, "s",
           goal=5.0)  # fmt: skip


def test_worker_ends_with_the_pipe_to_its_supervisor_alone(tmp_path: Path) -> None:
    """Where the kernel's signal for a dead parent cannot be had."""
    attempt = tmp_path / "run" / "attempts" / "001"
    Plan(steps=1000).write(attempt)
    theirs, mine = os.pipe()
    environment = {"TESSERA_ATTEMPT": str(attempt), "TESSERA_SUPERVISOR_PIPE": str(theirs)}
    process = subprocess.Popen(
        [sys.executable, "-m", WORKER, "orphan"],
        env=os.environ | environment | {"RANK": "0", "WORLD_SIZE": "1"}, pass_fds=(theirs,),
    )  # fmt: skip
    os.close(theirs)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        os.close(mine)
        assert process.wait(LIMIT_SECONDS) == INTERNAL
    finally:
        process.kill()
        process.wait()
