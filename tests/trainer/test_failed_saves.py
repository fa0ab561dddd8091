"""Saves that fail for too long end a run, but not before one more was tried."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import tiny_run
from tests.trainer.test_checkpoints import outcome
from tests.trainer.test_interval import Time
from trainer.callbacks.protocol import Callback, RunView
from trainer.checkpoint.commit import committed_steps, step_folder
from trainer.checkpoint.failures import Failures
from trainer.checkpoint.spec import CheckpointSpec
from trainer.progress import Progress


def test_time_counts_from_the_first_failure_in_a_row() -> None:
    time = Time()
    failures = Failures(60.0, time)
    time.seconds = 9000.0
    assert not failures.is_late  # no save was tried: a long interval is no fault
    failures.add()
    time.seconds += 3599.0
    failures.add()
    assert not failures.is_late
    time.seconds += 1.0
    assert failures.is_late
    failures.clear()
    assert not failures.is_late
    failures.add()
    assert (failures.in_a_row, failures.minutes, failures.is_late) == (1, 0.0, False)


def test_without_a_limit_no_time_is_too_long() -> None:
    time = Time()
    failures = Failures(None, time)
    failures.add()
    time.seconds = 1e9
    assert not failures.is_late


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_minutes_without=0\.0: set it above 0, or to null"):
        CheckpointSpec(max_minutes_without=0.0)


class Block(Callback):
    """Lets the saves of some steps fail: their folders are in the way."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def build(self) -> "Block":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.is_main, self.folder = view.is_main, view.folder / "checkpoints"

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step in self.steps and self.is_main:
            step_folder(self.folder, progress.step).mkdir(parents=True)
            (step_folder(self.folder, progress.step) / "in_the_way").touch()


def blocked(cache: Path, steps: range) -> Any:
    """Return a run that saves every four steps and may lack a checkpoint for no time at all."""
    spec = CheckpointSpec(background=False, keep=3, max_minutes_without=1e-9)
    return tiny_run(cache, save_every=4, checkpoint=spec, callbacks={"block": Block(steps)})


def test_saves_that_fail_for_too_long_end_the_run_with_the_bytes(
    tmp_path: Path, cache: Path
) -> None:
    messages = run_ranks(2, outcome, tmp_path, blocked(cache, range(4, 8)))
    for message in messages:  # of three in a row there was no time
        assert "2 saves in a row failed within 0 minutes, the last one: " in message
        assert f"B, {tmp_path}/checkpoints has " in message
    assert any("Directory not empty" in message for message in messages)


def test_a_last_try_that_is_good_lets_the_run_go_on(tmp_path: Path, cache: Path) -> None:
    run = blocked(cache, range(4, 5))
    assert run_ranks(1, outcome, tmp_path, run) == ["finished"]
    last, regular, tried = committed_steps(tmp_path / "checkpoints")
    assert (last, regular) == (10, 8)
    assert tried in (5, 6, 7)  # no save is due there
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count("ckpt_failed") == 1
