"""A stop may come at any moment: the last step that was done is saved, and nothing is lost.

Forked ranks, up to their exit records; the signal reaches one rank alone, at an exact place.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.exit_codes import FINISHED, PREEMPTED
from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run
from trainer.batch import Batch
from trainer.callbacks.protocol import Callback
from trainer.checkpoint.commit import committed_steps
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import Step, StepLoader
from trainer.data.pretraining import PretrainingData
from trainer.directory import is_unfinished
from trainer.distributed import Placement
from trainer.progress import Progress
from trainer.record import read_lines
from trainer.run import Run

STEPS = 6
STOP_STEP = 3


@dataclass(frozen=True, kw_only=True)
class StoppedEval(EvalLoader):
    """Sends SIGTERM to its own process at the second batch of every evaluation."""

    def batches(self) -> Iterator[tuple[int, Batch]]:
        for number, batch in enumerate(super().batches()):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@dataclass(frozen=True, kw_only=True)
class StalledLoader(StepLoader):
    """The data of the step after STOP_STEP does not come; SIGTERM does, while it is waited for."""

    place: Path

    def step(self, number: int) -> Step:
        if number == STOP_STEP:
            while not self.is_waited_for():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600.0)
        return super().step(number)

    def is_waited_for(self) -> bool:
        place = json.loads(self.place.read_text().partition("\n")[0])
        return (place["phase"], place["step"]) == ("data", STOP_STEP + 1)


@dataclass(frozen=True, kw_only=True)
class StoppedData(PretrainingData):
    """Builds a loader that strikes on the last rank."""

    phase: str
    place: Path
    """Of the last rank."""

    def build(
        self, *, rank: int, num_ranks: int, **settings: Any
    ) -> tuple[StepLoader, EvalLoader | None]:
        loader, evaluation = super().build(rank=rank, num_ranks=num_ranks, **settings)
        assert evaluation is not None
        if rank < num_ranks - 1:
            return loader, evaluation
        if self.phase == "build":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.phase == "evaluation":
            return loader, StoppedEval(**vars(evaluation))
        if self.phase == "stalled data":
            return StalledLoader(**vars(loader), place=self.place), evaluation
        return loader, evaluation


@dataclass(frozen=True, kw_only=True)
class StopAfter(Callback):
    """Sends SIGTERM to rank 1 once STOP_STEP is done."""

    def build(self) -> "StopAfter":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == STOP_STEP and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Slow(Callback):
    """Makes each step last a while."""

    def build(self) -> "Slow":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        time.sleep(0.05)


def run_of(cache: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {"max_steps": STEPS, "eval_every": 3, "data_micro_rows": 4}
    return tiny_run(cache, **(settings | {"data_eval_fraction": 0.05} | changes))


def stopped(run: Run, phase: str, folder: Path) -> Run:
    """Return the run with a stop in it, for a first start in `folder` on two ranks."""
    if phase == "step":
        return replace(run, callbacks={"stop": StopAfter()})
    place = folder / "attempts" / "001" / "place.00001.json"
    return replace(run, data=StoppedData(**vars(run.data), phase=phase, place=place))


def execute_in(placement: Placement, folder: Path, run: Run) -> tuple[int, float]:
    """Train as one rank of a start in `folder`; return the exit code and the seconds it took."""
    from launch.worker import execute

    start = time.monotonic()
    code = execute(run, placement, start_in(folder, placement).locate)
    return code, time.monotonic() - start


def trained(folder: Path, run: Run, ranks: int = 2) -> tuple[set[int], float]:
    outcomes = run_ranks(ranks, execute_in, folder, run)
    return {code for code, _ in outcomes}, max(seconds for _, seconds in outcomes)


def curve(folder: Path) -> list[tuple[Any, ...]]:
    lines = read_lines(folder / "metrics.jsonl")
    return [(line["step"], line["split"], line["loss"], line.get("grad_norm")) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    assert trained(folder, run_of(cache))[0] == {FINISHED}
    return folder


@pytest.mark.parametrize("phase", ["evaluation", "stalled data", "step"])
def test_stop_saves_the_last_step_and_the_resumed_curve_is_that_of_a_run_that_went_on(
    whole: Path, tmp_path: Path, cache: Path, phase: str
) -> None:
    folder = tmp_path / "tiny"
    codes, _ = trained(folder, stopped(run_of(cache), phase, folder))
    assert codes == {PREEMPTED}  # a stall of 600 s was not waited for
    (step,) = committed_steps(folder / "checkpoints")
    assert step == max(line["step"] for line in read_lines(folder / "ledger/rank00001.jsonl"))
    assert step == STOP_STEP
    # What is asked at the end of step 3 is heard at the first batch of its evaluation.
    assert ("eval" in {split for _, split, *_ in curve(folder)}) == (phase == "stalled data")
    assert trained(folder, run_of(cache))[0] == {FINISHED}
    assert curve(folder) == curve(whole)


def test_last_evaluation_that_was_cut_off_is_repeated_by_the_same_command(
    whole: Path, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "tiny"
    assert trained(folder, stopped(run_of(cache, max_steps=3), "evaluation", folder))[0] == {
        PREEMPTED
    }
    assert committed_steps(folder / "checkpoints") == [3]
    assert is_unfinished(folder, max_steps=3)
    assert trained(folder, run_of(cache, max_steps=3))[0] == {FINISHED}
    assert not is_unfinished(folder, max_steps=3)
    assert curve(folder) == [line for line in curve(whole) if line[0] <= 3]


def test_stop_before_the_first_step_ends_at_once_and_leaves_no_checkpoint(
    tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "tiny"
    codes, _ = trained(folder, stopped(run_of(cache), "build", folder), ranks=1)
    assert codes == {PREEMPTED}
    assert committed_steps(folder / "checkpoints") == []
    record = json.loads((folder / "attempts" / "001" / "exit.00000.json").read_text())
    assert record["reason"] == "stopped by SIGTERM before the first step of this start"
    assert read_lines(folder / "ledger" / "rank00000.jsonl") == []
    assert curve(folder) == []


def test_run_with_a_limit_of_time_ends_before_it_with_its_last_step_saved(
    tmp_path: Path, cache: Path
) -> None:
    for limit in (9, 18, 36):  # as much time as this machine needs for a first step
        folder = tmp_path / str(limit) / "tiny"
        run = run_of(
            cache, max_steps=1000, eval_every=None, stop_at=f"+{limit}s",
            callbacks={"slow": Slow()},
        )  # fmt: skip
        codes, seconds = trained(folder, run)
        if codes == {PREEMPTED} and seconds < limit and committed_steps(folder / "checkpoints"):
            break
    assert codes == {PREEMPTED}
    assert seconds < limit
    (step,) = committed_steps(folder / "checkpoints")
    assert 0 < step < 1000
    record = json.loads((folder / "attempts" / "001" / "exit.00000.json").read_text())
    assert record["reason"] == "stopped by its time limit"
    assert math.isclose(record["step"], step)
