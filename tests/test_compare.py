"""The table of benchmarks.compare, and how figures are read off the rows of benchmarks."""

import os
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.figure import Figure
from benchmarks.roofline.cost import figure_of
from benchmarks.train_step_figures import figures_of
from benchmarks.train_step_report import summarise
from benchmarks.train_step_sides import Curve
from launch.exit_codes import BAD_CONFIG, FINISHED


def curve(step_seconds: float, peak_gib: float, loss: float) -> Curve:
    return Curve(
        losses=[loss] * 5,
        stamps=[step_seconds * n for n in range(5)],
        cpu_stamps=[0.0] * 5,
        held_gib=0.5,
        peak_gib=peak_gib,
    )


def rounds() -> list[dict[str, Curve]]:
    return [
        {
            "ours": curve(1.0, 2.0, 3.0),
            "theirs": curve(2.5, 4.0, 3.003),
            "ours_compiled": curve(0.8, 2.0, 3.0),
            "theirs_compiled": curve(factor, 1.6, 3.0),
        }
        for factor in (0.8, 1.0, 1.6)
    ]


def test_a_rows_figures_are_ratios_within_rounds() -> None:
    row = summarise(rounds(), tokens=100, warmup=2, precision="bf16")
    speed, memory, losses, compiled, compiled_memory, _ = figures_of(row)
    assert (speed.value, speed.is_met) == (2.5, True)
    assert speed.ours["median"] == pytest.approx(100.0)
    assert speed.theirs is not None
    assert speed.theirs["median"] == pytest.approx(40.0)
    assert (memory.value, memory.is_met) == (0.5, True)
    assert losses.value == pytest.approx(0.001, rel=0.01)
    assert (compiled.value, compiled.is_met) == (pytest.approx(1.25), False)
    assert (compiled_memory.value, compiled_memory.is_met) == (1.25, False)


def test_share_of_products() -> None:
    case = {"product_seconds": 1.3, "seconds": 2.0, "step_seconds": [1.3, 2.0, 2.6]}
    figure = figure_of(case, "eager")
    assert (figure.value, figure.is_met) == (0.65, True)
    assert figure.ours == {"median": 0.65, "min": 0.5, "max": 1.0}


def test_a_line_names_both_sides_target_and_verdict() -> None:
    figure = Figure(
        name="step", ours={"median": 1234.0, "min": 1200.0, "max": 1300.0},
        theirs={"median": 12.25, "min": 12.0, "max": 13.0}, target=">= 2", limit=2.0, value=1.5,
        is_upper=False,
    )  # fmt: skip
    assert compare.line(figure) == (
        "| step | 1,234 [1,200 - 1,300] | 12.2 [12.0 - 13.0] | >= 2 | 1.50 | no |"
    )


def test_parts_are_known_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["only=step,produts"]) == BAD_CONFIG
    assert capsys.readouterr().err.startswith("compare: only=produts is unknown; set it to some of")


def one_process() -> list[Figure]:
    """Return a figure whose value is the process that measured it."""
    found = figure_of({"product_seconds": 1.0, "seconds": 2.0, "step_seconds": [2.0]}, "eager")
    return [replace(found, value=os.getpid())]


def test_each_part_has_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked behind another's threads, the part `host` waited for ever."""
    rows: list[Any] = []
    monkeypatch.setattr(compare, "append_row", lambda _, row: rows.append(row))
    for name in ("step", "host"):
        monkeypatch.setitem(compare.PARTS, name, one_process)
    assert compare.main(["only=step,host"]) == FINISHED
    assert capsys.readouterr().out.splitlines()[-1].endswith(" | yes |")
    values = [row["figures"][0]["value"] for row in rows]
    assert len({os.getpid(), *values}) == 3
