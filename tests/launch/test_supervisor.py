"""Real processes: how a run ends, by itself, by a signal or by force, and how it goes on.

One start costs 4 s (6 s with two workers), nearly all of it importing torch: tests share starts.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import BAD_CONFIG, DATA, FINISHED, INTERNAL, NO_PROGRESS, PREEMPTED
from tests.conftest import Figure
from trainer.checkpoint.commit import committed_steps, read_manifest, step_folder, verify
from trainer.record import read_lines

pytestmark = pytest.mark.timeout(600)  # of all starts that tests share

LIMIT_SECONDS = 150.0  # of each wait: a loaded machine imports torch for a minute
MAX_STEPS = {1: 300, 2: 150}  # by processes: enough to be ended on the way, four times
ENDLESS = "max_steps=1000000"
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDS = {1: (signal.SIGINT,), 2: (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)}
"""By processes: what ends a run on every commit, each signal once."""
REST = {1: (signal.SIGTERM, signal.SIGUSR1), 2: (signal.SIGINT,)}
"""What the slow command adds."""
TINY = [
    "experiment=demo", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "data.row_tokens=32", "data.max_documents=10",
    "callbacks.ngrams=null", "callbacks.closing.sample_tokens=0", "eval_every=null",
    "log_every=1", "schedule=constant",
]  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A started `tessera train` and what it writes."""

    process: subprocess.Popen[bytes]
    output: Path
    run: Path
    seen: set[int] = field(default_factory=set)
    """Every worker that was ever looked up: a dead supervisor names none any more."""

    @property
    def text(self) -> str:
        return self.output.read_text()

    def workers(self) -> dict[int, int]:
        """Return {rank: process id} of the children that are workers."""
        found = [pid for pid in children(self.process.pid) if is_worker(pid)]
        self.seen.update(found)
        return {rank_of(pid): pid for pid in found}

    def destroy(self) -> None:
        """Kill what is left."""
        for pid in (*children(self.process.pid), *self.seen):
            if b"launch" in command_line(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def wait(self, limit: float = LIMIT_SECONDS) -> int:
        return self.process.wait(limit)

    def wait_for_steps(self, count: int) -> None:
        """Return when rank 0 has finished `count` more steps, or fail when the run has ended."""
        before = len(ledger(self.run))

        def has_trained() -> bool:
            assert self.process.poll() is None, self.text
            return len(ledger(self.run)) >= before + count

        until(has_trained)


@contextmanager
def started(
    folder: Path, cache: Path, *words: str, python: tuple[str, ...] = ()
) -> Iterator[Command]:
    """Start a run below `folder`; whatever happens, nothing of it outlives the block."""
    number = len(list(folder.glob("output-*")))
    output = folder / f"output-{number}"
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    settings = [*TINY, f"runs={folder}/runs", f"data.cache={cache}"]
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *python, "-m", "launch", "train", *settings, *words],
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1"},  # the same sums however it is started
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    command = Command(process=process, output=output, run=folder / "runs" / "demo")
    try:
        yield command
    finally:
        command.destroy()


def steps_of(processes: int) -> tuple[str, str]:
    return f"max_steps={MAX_STEPS[processes]}", f"launch.processes={processes}"


def until(condition: Callable[[], bool], limit: float = LIMIT_SECONDS) -> float:
    """Poll until `condition` holds; return the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit, f"not within {limit} s"
        time.sleep(0.01)
    return time.monotonic() - start


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_line(pid: int) -> bytes:
    """Return nothing for a zombie, as for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_worker(pid: int) -> bool:
    return b"launch.worker" in command_line(pid)


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(text.removeprefix(b"RANK=")) for text in variables if text.startswith(b"RANK="))


def has_pending(pid: int, number: int) -> bool:
    """Whether a signal waits for `pid` to receive it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("ShdPnd:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    raise AssertionError("no such field")


def ledger(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    return read_lines(run / "ledger" / f"rank{rank:05d}.jsonl")


def consumed(run: Path, rank: int) -> list[dict[str, Any]]:
    """Return the ledger without the number of the start."""
    return [{key: v for key, v in line.items() if key != "attempt"} for line in ledger(run, rank)]


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """Return what training computed at every step, exactly."""
    lines = read_lines(run / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def check_saved(run: Path, step: int) -> None:
    """Check that the newest checkpoint is that of `step`, and intact."""
    assert committed_steps(run / "checkpoints")[0] == step
    folder = step_folder(run / "checkpoints", step)
    verify(folder, read_manifest(folder), part=0, parts=1)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A start that a signal ended."""

    code: int
    text: str
    workers: int
    """How many there were."""
    outlived: int
    """How many of them the supervisor left behind."""
    seconds: float
    """From its end until none of them was left."""
    last_step: int
    """Last step that rank 0 executed, by its ledger."""
    newest_checkpoint: int


def end(command: Command, number: signal.Signals) -> Ended:
    """Let a run train for a while, send the signal, and see how it ends."""
    command.wait_for_steps(15)
    workers = command.workers()
    command.process.send_signal(number)
    code = command.wait()
    outlived = sum(map(is_worker, workers.values()))
    seconds = until(lambda: not any(map(is_worker, workers.values())))
    return Ended(
        code=code,
        text=command.text,
        workers=len(workers),
        outlived=outlived,
        seconds=seconds,
        last_step=ledger(command.run)[-1]["step"],
        newest_checkpoint=committed_steps(command.run / "checkpoints")[0],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[int, Path]:
    """The folders of runs that nobody disturbed, by number of processes; both run at once."""
    with ExitStack() as stack:
        commands = {}
        for processes in (1, 2):
            folder = tmp_path_factory.mktemp(f"whole-{processes}")
            commands[processes] = stack.enter_context(started(folder, cache, *steps_of(processes)))
        for command in commands.values():
            assert command.wait() == FINISHED, command.text
    return {processes: command.run for processes, command in commands.items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_run_ends_with_zero_and_a_full_record_of_every_rank(
    whole: dict[int, Path], processes: int
) -> None:
    run = whole[processes]
    steps = list(range(1, MAX_STEPS[processes] + 1))
    assert [step for step, *_ in curve(run)] == steps
    for rank in range(processes):
        assert [line["step"] for line in ledger(run, rank)] == steps
        assert (run / "attempts" / "001" / f"exit.{rank:05d}.json").exists()
    assert len(list((run / "ledger").iterdir())) == processes
    check_saved(run, steps[-1])
    page = (run / "report.html").read_text()
    assert f"step {MAX_STEPS[processes]} of {MAX_STEPS[processes]}" in page
    assert "nothing that the run knows of" in page


def test_torchrun_gives_the_same_numbers(
    whole: dict[int, Path], tmp_path: Path, cache: Path
) -> None:
    with started(tmp_path, cache, steps_of(2)[0], python=TORCHRUN) as command:
        assert command.wait() == FINISHED, command.text
    assert curve(command.run) == curve(whole[2])
    for rank in (0, 1):
        assert consumed(command.run, rank) == consumed(whole[2], rank)
    check_saved(command.run, MAX_STEPS[2])


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A run that was ended by several signals, started again at once each time, up to its end."""

    run: Path
    starts: dict[signal.Signals, Ended]
    code: int
    """Of the last start."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[..., Stopped]:
    """Returns what became of such a run, by its processes and the signals that ended it."""
    runs: dict[Any, Stopped] = {}

    def train(processes: int, ends: dict[int, Any] = ENDS) -> Stopped:
        key = processes, ends[processes]
        if key not in runs:
            folder = tmp_path_factory.mktemp(f"stopped-{processes}")
            last_words = [*steps_of(processes), "save_every=10"]
            words = [*last_words, ENDLESS]  # so that nothing but the signal ends it
            starts = {}
            for number in ends[processes]:
                with started(folder, cache, *words) as command:
                    starts[number] = end(command, number)
            with started(folder, cache, *last_words) as command:
                code = command.wait()
                assert code == FINISHED, command.text
            runs[key] = Stopped(run=command.run, starts=starts, code=code)
        return runs[key]

    return train


@pytest.mark.parametrize(
    ("processes", "number", "ends"),
    [
        pytest.param(processes, number, ends, marks=marks, id=f"{processes}-{number.name}")
        for ends, marks in ((ENDS, ()), (REST, pytest.mark.slow))
        for processes in (1, 2)
        for number in ends[processes]
        if number in STOPS
    ],
)
def test_signal_ends_a_run_as_preempted_with_its_last_step_saved(
    stopped: Callable[..., Stopped], processes: int, number: signal.Signals, ends: dict[int, Any]
) -> None:
    start = stopped(processes, ends).starts[number]
    assert start.code == PREEMPTED, start.text
    assert start.newest_checkpoint == start.last_step
    assert "Traceback" not in start.text


def test_no_worker_outlives_a_signal_to_its_supervisor(stopped: Callable[..., Stopped]) -> None:
    starts = stopped(2).starts
    assert [start.workers for start in starts.values()] == [2, 2, 2]
    assert [starts[number].outlived for number in ENDS[2] if number in STOPS] == [0, 0]


def test_workers_are_gone_five_seconds_after_their_supervisor_was_killed(
    stopped: Callable[..., Stopped], figure: Figure
) -> None:
    start = stopped(2).starts[signal.SIGKILL]
    assert start.code == -signal.SIGKILL
    figure("A10 `tessera train` killed with signal 9: until its workers are gone", start.seconds,
           "s", goal=5.0)  # fmt: skip
    assert start.newest_checkpoint <= start.last_step


@pytest.mark.parametrize("processes", [1, 2])
def test_run_started_again_after_every_end_has_the_numbers_of_one_that_never_ended(
    stopped: Callable[..., Stopped], whole: dict[int, Path], processes: int
) -> None:
    assert stopped(processes).code == FINISHED
    assert curve(stopped(processes).run) == curve(whole[processes])
    check_saved(stopped(processes).run, curve(whole[processes])[-1][0])
    assert (
        f"{len(ENDS[processes]) + 1} starts" in (stopped(processes).run / "report.html").read_text()
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_ledger_of_a_run_started_again_lacks_no_step_and_repeats_the_same_ones(
    stopped: Callable[..., Stopped], whole: dict[int, Path], processes: int
) -> None:
    """Only a killed run repeats steps: those after its newest checkpoint."""
    ends = stopped(processes).starts.values()
    for rank in range(processes):
        expected = {line["step"]: line for line in consumed(whole[processes], rank)}
        lines = consumed(stopped(processes).run, rank)
        assert {line["step"] for line in lines} == expected.keys()
        assert all(line == expected[line["step"]] for line in lines)
        assert len(lines) <= len(expected) + sum(
            e.last_step - e.newest_checkpoint + 1 for e in ends
        )


def test_signal_while_workers_start_ends_as_preempted(tmp_path: Path, cache: Path) -> None:
    """A machine may be taken back at any time: with another code, nobody starts the run again."""
    with started(tmp_path, cache, *steps_of(2)) as command:
        until(lambda: len(command.workers()) == 2)
        workers = command.workers()
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == PREEMPTED, command.text
    assert not any(map(is_worker, workers.values()))


@pytest.mark.parametrize("processes", [1, 2])
def test_stop_at_without_time_for_a_step_is_not_to_be_started_again(
    processes: int, tmp_path: Path, cache: Path
) -> None:
    """Who starts a run again after 75 would do so for ever."""
    with started(tmp_path, cache, "stop_at=+1s", ENDLESS, f"launch.processes={processes}") as run:
        assert run.wait() == NO_PROGRESS, run.text
    assert "stopped by its time limit; stop_at leaves no time for a start, a step and" in run.text
    assert f"last committed step: none; the same command starts anew (exit code {NO_PROGRESS})" in (
        run.text
    )


def test_second_interrupt_ends_a_run_that_hangs_at_once(tmp_path: Path, cache: Path) -> None:
    # Nothing else shall end it: not even that they are stopped.
    words = ("launch.processes=2", "launch.watchdog.stopped_seconds=600", ENDLESS)
    with started(tmp_path, cache, *words) as command:
        command.wait_for_steps(5)
        workers = command.workers()
        for worker in workers.values():
            os.kill(worker, signal.SIGSTOP)  # it cannot finish its step
        command.process.send_signal(signal.SIGINT)
        until(lambda: all(has_pending(worker, signal.SIGINT) for worker in workers.values()))
        assert command.process.poll() is None
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 128 + signal.SIGINT
        assert not any(map(is_worker, workers.values()))
        last = command.text.splitlines()[-1]
        assert last == (
            "tessera: SIGINT: stopped at once by a second signal, without a save; last committed "
            "step: none; the same command starts anew (exit code 130)"
        )


def test_killed_worker_ends_the_run_with_its_rank_and_signal(tmp_path: Path, cache: Path) -> None:
    words = ("launch.processes=2", "launch.restarts=0", ENDLESS)
    with started(tmp_path, cache, *words) as command:
        command.wait_for_steps(5)
        workers = command.workers()
        os.kill(workers[1], signal.SIGKILL)
        assert command.wait() == INTERNAL
        assert not any(map(is_worker, workers.values()))
    verdict = command.text.splitlines()[-1]
    assert verdict.startswith("tessera: rank 1 of 2 failed first")
    assert "SIGKILL" in verdict
    assert "last committed step: none" in verdict


def test_data_error_of_a_worker_ends_the_run_with_its_code(
    whole: dict[int, Path], tmp_path: Path, cache: Path
) -> None:
    assert whole  # it has filled the cache
    torn = tmp_path / "cache"
    shutil.copytree(cache, torn)
    shards = list(torn.glob("tokens/*/train-*.shard"))  # other tests share the cache
    for shard in shards:
        os.truncate(shard, shard.stat().st_size - 2)
    with started(tmp_path, torn, *steps_of(2)) as command:
        assert command.wait() == DATA, command.text
    (tokens,) = (shard for shard in shards if str(shard) in command.text)
    assert f"delete {tokens.parent}" in command.text
    assert "Traceback" not in command.text
    assert ledger(command.run) == []


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Callable[[], Command]]:
    """Returns a run of one process that goes on for as long as it is let."""
    with ExitStack() as stack:
        running: list[Command] = []

        def train() -> Command:
            if not running or running[-1].process.poll() is not None:
                folder = tmp_path_factory.mktemp("busy")
                command = started(folder, cache, ENDLESS, "save_every=null")
                running.append(stack.enter_context(command))
                running[-1].wait_for_steps(5)
            return running[-1]

        yield train


def test_second_run_in_a_folder_is_refused_while_the_first_goes_on(
    busy: Callable[[], Command], cache: Path
) -> None:
    first = busy()
    python = ("-X", "importtime")
    with started(first.output.parent, cache, ENDLESS, python=python) as second:
        assert second.wait() == BAD_CONFIG, second.text
    imports = [line for line in second.text.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip() for line in imports}
    assert "launch.cli" in names
    assert "torch" not in names  # at once: that alone takes seconds
    (line,) = (line for line in second.text.splitlines() if line not in imports)
    assert line.startswith(f"tessera: {first.run} is in use by process {first.process.pid} on ")
    assert [entry.name for entry in (first.run / "attempts").iterdir()] == ["001"]
    first.wait_for_steps(5)


def test_second_signal_ends_a_run_of_one_process_at_once(busy: Callable[[], Command]) -> None:
    command = busy()
    command.process.send_signal(signal.SIGSTOP)  # so that both arrive in the same step
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGTERM)
    command.process.send_signal(signal.SIGCONT)
    assert command.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert ": stopped at once by a second signal, without a save (exit code 1" in command.text
    assert committed_steps(command.run / "checkpoints") == []
