"""The gate against slow-downs: its arithmetic, and its ratios beside the stored ones."""

from collections.abc import Callable

import pytest

from benchmarks import regression
from benchmarks.in_turn import machine
from benchmarks.regression import Ratio, measure, slower, stored
from benchmarks.regression_pairs import Pair


def spinning(turns: int) -> Callable[[], object]:
    return lambda: sum(range(turns))


def test_a_pair_s_ratio_is_that_of_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "SAMPLE_SECONDS", 0.01)
    assert regression.ratio(Pair(spinning(60_000), spinning(20_000))) == pytest.approx(3.0, rel=0.2)


def test_a_ratio_beyond_its_tolerance_is_named_and_no_other() -> None:
    known = {name: Ratio(value=2.0, tolerance=1.15) for name in ("step", "head")}
    assert slower({"step": 2.29, "head": 1.0}, known) == []
    (line,) = slower({"step": 2.31, "head": 2.29}, known)
    assert line.startswith("step: 2.310 times the plain way, 2.000 was stored and 2.300 is allowed")


def test_the_stored_baseline_has_every_ratio_with_its_tolerance() -> None:
    _, known = stored()
    assert {name: each.tolerance for name, each in known.items()} == regression.TOLERANCES


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_has_become_slower_than_the_stored_ratios() -> None:
    """Measured in this run, against ratios of the same kind of processor: beside other jobs too."""
    where, known = stored()
    if where != (here := machine()["cpu"]):
        pytest.skip(f"ratios are stored for {where}, this is {here}: renew=true stores its own")
    assert not slower(measure(), known)
