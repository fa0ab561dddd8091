"""The arithmetic of the benchmarks of starts, determinism and overheads."""

import json
from pathlib import Path

import pytest

from benchmarks import determinism, overheads, start_up
from benchmarks.commands import FIRST_LOSS, median_step


def test_share_counts_each_event_as_often_as_it_comes() -> None:
    # 1000 steps of 1 s: 100 logs of 0.1 s, 2 evaluations of 5 s, 2 saves of 5 s.
    costs = {"log": 0.1, "evaluate": 5.0, "save": 5.0}
    intervals = {"log": 10, "evaluate": 500, "save": 500}
    extra = 100 * 0.1 + 2 * 5.0 + 2 * 5.0
    expected = pytest.approx(100 * extra / (1000 + extra), rel=1e-12)
    assert overheads.share(1.0, costs, intervals) == expected


def test_an_event_that_costs_a_fiftieth_of_its_interval_is_above_the_limit() -> None:
    step = {"data": [9.0, 0.1], "train_step": [9.0, 0.8], "control": [9.0, 0.1]}
    spans = {**step, "log": [0.0], "evaluate": [11.0], "save": [0.0], "written": [0.0]}
    intervals = {"log": 10, "evaluate": 500, "save": 500, "written": 500}
    figure = overheads.figure_of("demo", spans, intervals)
    assert figure.value == pytest.approx(100 * 11 / 511)
    assert not figure.is_met


def test_the_clock_gives_time_to_the_phase_that_ends() -> None:
    clock = overheads.Clock()
    for phase in ("data", "train_step", "data", "log"):
        clock.enter(phase)
    assert {name: len(spans) for name, spans in clock.spans.items()} == {
        "start": 1, "data": 2, "train_step": 1,
    }  # fmt: skip


def test_cost_of_determinism_is_taken_within_rounds() -> None:
    figure = determinism.figure_of("demo", run=[1.1, 2.2, 4.8], off=[1.0, 2.0, 4.0])
    assert figure.value == pytest.approx(10.0)
    assert figure.ours["max"] == 4.8


def test_starts_are_compared_within_rounds() -> None:
    times = {"eager": [2.0, 4.0, 1.0], "compiled": [2.4, 4.8, 3.0]}
    (figure,) = start_up.figures_of("llama", times)
    assert figure.value == pytest.approx(1.2)
    assert figure.is_met


def test_a_start_of_the_demo_has_limits_in_seconds() -> None:
    times = {"eager": [8.5], "compiled": [9.0], "fresh": [7.0], "help": [0.6]}
    met = [figure.is_met for figure in start_up.figures_of("demo", times)]
    assert met == [False, True, False, True]


def test_steps_are_the_time_between_log_points(tmp_path: Path) -> None:
    times = [0.0, 50.0, 51.0, 53.0, 54.0]
    lines = [{"split": "train", "time": each} for each in times]
    text = "\n".join(json.dumps(line) for line in [*lines, {"split": "eval", "time": 99.0}])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert median_step(tmp_path, warmup=2) == 1.0


def test_the_first_loss_is_told_from_other_lines() -> None:
    assert FIRST_LOSS.search("step   1/400 | loss  5.5931 | grad norm 14.2")
    assert not FIRST_LOSS.search("step  20/400 | loss  3.9437")
    assert not FIRST_LOSS.search("save 1/400 | saved")


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only=demo3 is unknown; set it to some of demo, demo2"):
        determinism.figures(determinism.DEFAULTS | {"only": "demo,demo3"})
