"""Which rank is reported as holding the others up: from looks at their places alone."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from launch.stragglers import IN_A_ROW, SECONDS, STEPS, Stragglers
from launch.traces import STOPPED

GAP = 0.25
LOOKS = round(SECONDS / GAP)
"""Of one comparison, where each is a step further."""
Places = list[dict[str, Any]]


def looks(odd: dict[str, Any], comparisons: int, num_ranks: int = 4) -> Iterator[Places]:
    """Yield what is seen while rank 2 is at `odd` for so many comparisons, and then a while."""
    for look in range(LOOKS * (IN_A_ROW + 2) + 1):
        places: Places = [
            {"step": 2 + look, "phase": "train_step", "state": ""} for _ in range(num_ranks)
        ]
        if look < LOOKS * comparisons:
            places[2] |= odd
        yield places


def told(seen: Iterator[Places], num_ranks: int = 4) -> list[str]:
    stragglers = Stragglers(num_ranks)
    return [line for places in seen if (line := stragglers.look(places, GAP))]


def test_rank_that_is_stopped_again_and_again_is_told_once_with_what_it_costs() -> None:
    (line,) = told(looks({"state": STOPPED}, IN_A_ROW + 1))
    assert line.startswith(f"rank 2 of 4 holds the others up, {IN_A_ROW} times in a row: steps ")
    assert line.endswith(
        f" cost it {GAP:.2f} s each, the median rank 0.00 s (of all these steps {SECONDS:.1f} s "
        "stopped, 0.0 s without data); look at its core, memory and disk"
    )


def test_rank_that_waits_for_its_data_is_told() -> None:
    (line,) = told(looks({"phase": "data"}, IN_A_ROW + 1))
    assert f"0.0 s stopped, {SECONDS:.1f} s without data" in line


@pytest.mark.parametrize(
    ("phase", "comparisons"), [("data_of_others", IN_A_ROW + 1), ("data", IN_A_ROW - 1)]
)
def test_rank_that_waits_for_others_or_not_for_long_is_not(phase: str, comparisons: int) -> None:
    assert told(looks({"phase": phase}, comparisons)) == []


def test_ranks_that_cost_the_same_are_not_told_of() -> None:
    place = {"phase": "data", "state": ""}
    assert told([{"step": 2 + n, **place}] * 4 for n in range(LOOKS * (IN_A_ROW + 1))) == []


def noisy(seed: int, num_ranks: int, slow: float = 1.0) -> Iterator[Places]:
    """Yield an hour of a machine that is too busy: what a step costs a rank goes up and down by a
    third, and in one look of twenty it has not come out of its data. Rank 1 is `slow` times slower.
    """
    chance, cpu = random.Random(seed), [0.0] * num_ranks
    speed = [1.0] * num_ranks
    for look in range(14_400):
        if look % LOOKS == 0:  # others' programs come and go
            speed = [chance.lognormvariate(0.0, 0.3) for _ in range(num_ranks)]
        for rank in range(num_ranks):
            cpu[rank] += 0.1 * speed[rank] * (slow if rank == 1 else 1.0)
        yield [
            {
                "step": 2 + look // 2, "state": "", "cpu_seconds": cpu[rank],
                "phase": "data" if chance.random() < 0.05 else "train_step",
            }
            for rank in range(num_ranks)
        ]  # fmt: skip


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_busy_machine_is_no_straggler_and_a_rank_at_half_the_speed_is_one_in_spite_of_it(
    num_ranks: int,
) -> None:
    false = [line for seed in range(5) for line in told(noisy(seed, num_ranks), num_ranks)]
    assert len(false) <= 1  # in five hours
    lines = told(noisy(0, num_ranks, slow=2.5), num_ranks)
    assert lines
    assert all(line.startswith(f"rank 1 of {num_ranks} ") for line in lines)
    assert STEPS < LOOKS
