"""Which rank is reported as holding the others up: from looks at their places alone."""

from typing import Any

import pytest

from launch.stragglers import RATIO, STEPS, Stragglers
from launch.traces import STOPPED

GAP = 0.25


def told(odd: dict[str, Any], looks: int, num_ranks: int = 4) -> list[str]:
    """Return what is said of STEPS steps in which rank 2 was at `odd` in so many looks."""
    stragglers, found = Stragglers(num_ranks), []
    for look in range(STEPS + 1):
        places: list[dict[str, Any]] = [
            {"step": 2 + look, "phase": "train_step", "state": ""} for _ in range(num_ranks)
        ]
        if look < looks:
            places[2] |= odd
        found.append(stragglers.look(places, GAP))
    return [line for line in found if line]


def test_rank_that_is_stopped_again_and_again_is_told_with_what_it_costs() -> None:
    (line,) = told({"state": STOPPED}, looks=STEPS)
    assert line == (
        f"rank 2 of 4 holds the others up: steps 2 to {STEPS + 1} cost it {GAP:.2f} s each, "
        f"the median rank 0.00 s (of all these steps {STEPS * GAP:.1f} s stopped, 0.0 s without "
        "data); look at its core, memory and disk"
    )


def test_rank_that_waits_for_its_data_is_told() -> None:
    (line,) = told({"phase": "data"}, looks=STEPS)
    assert f"0.0 s stopped, {STEPS * GAP:.1f} s without data" in line


@pytest.mark.parametrize(("phase", "looks"), [("data_of_others", STEPS), ("data", 1)])
def test_rank_that_waits_for_others_or_once_is_not(phase: str, looks: int) -> None:
    assert told({"phase": phase}, looks) == []


def test_ranks_that_cost_the_same_are_not_told_of() -> None:
    stragglers = Stragglers(2)
    for look in range(STEPS + 1):
        place = {"step": 2 + look, "phase": "data", "state": ""}
        assert stragglers.look([place, place], GAP) is None
    assert RATIO > 1
