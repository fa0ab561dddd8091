"""The best evaluation is kept on disk, and a run ends when none gets better; also when resumed."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import DieAt, tiny_run, train
from trainer.best import Best, BestSpec
from trainer.callbacks.protocol import Callback, RunView
from trainer.checkpoint.commit import committed_steps, step_folder
from trainer.checkpoint.spec import CheckpointSpec
from trainer.mesh import MeshSpec
from trainer.progress import Progress
from trainer.record import read_lines


def judged(spec: BestSpec, values: list[float]) -> tuple[list[bool], Best]:
    best = Best(spec)
    name = str(spec.metric)
    return [best.judge(step, {name: value}) for step, value in enumerate(values, start=1)], best


def test_better_is_lower_for_losses_and_higher_for_scores() -> None:
    found, best = judged(BestSpec(metric="loss"), [3.0, 2.0, 2.5, 2.0, 1.9])
    assert found == [True, True, False, False, True]
    assert (best.step, best.value, best.num_worse) == (5, 1.9, 0)
    found, best = judged(BestSpec(metric="macro_f1", min_delta=0.1), [0.5, 0.55, 0.61, 0.4])
    assert found == [True, False, True, False]
    assert judged(BestSpec(metric="calibration_error"), [0.2, 0.1])[0] == [True, True]
    assert judged(BestSpec(metric="macro_f1", goal="min"), [0.2, 0.1])[0] == [True, True]
    assert judged(BestSpec(), [1.0, 2.0])[0] == [False, False]


def test_a_number_that_is_none_is_never_the_best() -> None:
    found, best = judged(BestSpec(metric="loss", patience=2), [math.nan, 1.0, math.nan, math.nan])
    assert found == [False, True, False, False]
    assert best.is_over


def test_an_evaluation_without_the_number_is_no_better_and_no_worse() -> None:
    best = Best(BestSpec(metric="exact_match", patience=1))
    assert best.judge(1, {"exact_match": 0.5, "loss": 2.0})
    assert not best.judge(2, {"loss": 1.0})
    assert (best.num_worse, best.is_over) == (0, False)
    assert not best.judge(3, {"exact_match": 0.4})
    assert best.is_over


def test_the_state_goes_on_and_is_forgotten_for_another_metric() -> None:
    _, best = judged(BestSpec(metric="loss", patience=3), [1.0, 2.0, 2.0])
    state = json.loads(json.dumps(best.state()))
    again = Best(BestSpec(metric="loss", patience=3))
    again.load(state)
    assert not again.judge(4, {"loss": 1.5})
    assert again.is_over
    other = Best(BestSpec(metric="accuracy"))
    other.load(state)
    assert other.step is None


def test_the_state_is_forgotten_for_another_sample(caplog: pytest.LogCaptureFixture) -> None:
    spec = BestSpec(metric="loss", patience=3)
    best = Best(spec, "3840 of a")
    for step, value in enumerate([1.0, 2.0, 2.0, 2.0], start=1):
        best.judge(step, {"loss": value})
    state = json.loads(json.dumps(best.state()))
    again = Best(spec, "3840 of a")
    again.load(state)
    assert (again.step, again.is_over, caplog.text) == (1, True, "")
    old = {name: value for name, value in state.items() if name != "sample"}
    for known, sample in ((state, "768 of a"), (state, "3840 of b"), (old, "3840 of a")):
        other = Best(spec, sample)
        with caplog.at_level("INFO"):
            other.load(known)
        assert "begin anew: step 1 was best by loss on " in caplog.text
        assert f", now it is loss on {sample}" in caplog.text
        caplog.clear()
        assert (other.step, other.num_worse, other.recent) == (None, 0, {})
        assert other.judge(5, {"loss": 9.0})
    with caplog.at_level("INFO"):
        Best(BestSpec(), "3840 of a").load(state)
    assert not caplog.text  # nothing begins where nothing is judged


def test_the_best_is_one_of_the_steps_that_have_a_checkpoint() -> None:
    for goal, values in (("min", [3.0, 1.0, 2.0, 2.5]), ("max", [1.0, 4.0, 3.0, 2.0])):
        _, best = judged(BestSpec(metric="loss", goal=goal), values)
        best.survive([4, 2])
        assert best.step == 2
        again = Best(best.spec)
        again.load(json.loads(json.dumps(best.state())))
        again.survive([4, 3, 1])
        assert (again.step, again.value) == (3, values[2])
        assert again.judge(5, {"loss": values[1]})
        again.survive([])
        assert again.step is None
        assert again.judge(6, {"loss": values[2]})


def worst_is_best(cache: Path, **changes: Any) -> Any:
    """Return a run whose first evaluation is the best one: losses fall, and more is better."""
    spec = BestSpec(metric="loss", goal="max", patience=3)
    settings = {"eval_every": 2, "save_every": 2, "max_steps": 40, "best": spec} | changes
    return tiny_run(cache, **settings)


def steps_of(folder: Path, split: str) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == split]


def test_the_best_step_stays_and_the_run_ends_when_patience_runs_out(
    tmp_path: Path, cache: Path
) -> None:
    assert run_ranks(1, train, tmp_path / "run", worst_is_best(cache)) == [True]
    assert steps_of(tmp_path / "run", "eval") == [2, 4, 6, 8]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert committed_steps(checkpoints) == [8, 6, 2]  # the newest two, and the best
    assert (checkpoints / "best").read_text() == "step_00000002\n"
    assert (checkpoints / "latest").read_text() == "step_00000008\n"
    assert run_ranks(1, train, tmp_path / "run", worst_is_best(cache)) == [True]
    assert steps_of(tmp_path / "run", "eval")[-1] == 8  # it is over: nothing more is trained


def test_an_improvement_is_saved_though_no_save_is_due(tmp_path: Path, cache: Path) -> None:
    run = tiny_run(
        cache, eval_every=3, save_every=None, max_steps=10, best=BestSpec(metric="perplexity")
    )
    run_ranks(1, train, tmp_path / "run", run)
    losses = {
        line["step"]: line["perplexity"]
        for line in read_lines(tmp_path / "run" / "metrics.jsonl")
        if line["split"] == "eval"
    }
    best = min(losses, key=losses.__getitem__)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "best").read_text() == f"step_{best:08d}\n"
    assert best in committed_steps(checkpoints)


class BlockAndDie(Callback):
    """Lets the save of one step fail, since its folder is there, and dies once the next is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def build(self) -> "BlockAndDie":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.is_main, self.folder = view.is_main, view.folder / "checkpoints"

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == self.step and self.is_main:
            self.wait_for(self.step - 1)  # it clears away what is no checkpoint
            step_folder(self.folder, self.step).mkdir()
            (step_folder(self.folder, self.step) / "in_the_way").touch()
        if progress.step == self.step + 2:
            self.wait_for(self.step + 1)
            os._exit(9)

    def wait_for(self, step: int) -> None:
        """Wait until the save of `step` is done, whose writer ends with the hints."""
        latest = self.folder / "latest"
        while not latest.exists() or latest.read_text() != f"step_{step:08d}\n":
            time.sleep(0.01)


def test_a_best_step_that_could_not_be_saved_leaves_the_one_before_on_disk(
    tmp_path: Path, cache: Path
) -> None:
    run = tiny_run(
        cache, eval_every=2, save_every=1, max_steps=6, best=BestSpec(metric="loss"),
        checkpoint=CheckpointSpec(keep=1), callbacks={"block": BlockAndDie(4)},
    )  # fmt: skip
    with pytest.raises(Exception, match="rank"):
        run_ranks(2, train, tmp_path / "run", run)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert committed_steps(checkpoints) == [5, 2]
    assert (checkpoints / "best").read_text() == "step_00000002\n"
    run_ranks(1, train, tmp_path / "run", replace(run, callbacks={}))
    assert committed_steps(checkpoints) == [6]  # better than step 2, and all others
    assert (checkpoints / "best").read_text() == "step_00000006\n"


def test_a_run_that_went_back_forgets_a_best_step_that_is_gone(tmp_path: Path, cache: Path) -> None:
    run = tiny_run(
        cache, eval_every=4, save_every=1, max_steps=8, best=BestSpec(metric="loss"),
        checkpoint=CheckpointSpec(keep=2, background=False),
    )  # fmt: skip
    checkpoints = tmp_path / "run" / "checkpoints"
    run_ranks(1, train, tmp_path / "run", run)
    assert (checkpoints / "best").read_text() == "step_00000008\n"  # for it step 4 was deleted
    run_ranks(1, train, tmp_path / "run", replace(run, resume_step=7, max_steps=7))
    assert committed_steps(checkpoints) == [7]
    assert not (checkpoints / "best").exists()
    assert (checkpoints / "latest").read_text() == "step_00000007\n"
    run_ranks(1, train, tmp_path / "run", run)
    assert (checkpoints / "best").read_text() == "step_00000008\n"


def test_a_killed_run_on_other_ranks_ends_where_one_that_was_not_would(
    tmp_path: Path, cache: Path
) -> None:
    killed = worst_is_best(cache, callbacks={"die": DieAt(5)}, mesh=MeshSpec(dp_shard=2))
    with pytest.raises(Exception, match="rank"):
        run_ranks(2, train, tmp_path / "run", killed)
    run_ranks(1, train, tmp_path / "run", worst_is_best(cache))
    assert steps_of(tmp_path / "run", "eval") == [2, 4, 6, 8]
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step_00000002\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 3}, "no effect without a metric"),
        ({"goal": "max"}, "goal, .* have no effect without a metric; set metric"),
        ({"metric": "loss", "patience": 0}, "patience=0 is below 1"),
        ({"metric": "loss", "min_delta": -0.1}, "min_delta=-0.1 is negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BestSpec(**settings)


def test_a_metric_that_no_evaluation_has_is_refused_before_the_run(cache: Path) -> None:
    with pytest.raises(ValueError, match="did you mean perplexity"):
        tiny_run(cache, eval_every=2, best=BestSpec(metric="perplexty")).check(1)
    with pytest.raises(ValueError, match="needs evaluations; set eval_every"):
        tiny_run(cache, best=BestSpec(metric="loss")).check(1)
