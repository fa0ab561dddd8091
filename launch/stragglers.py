"""Which rank holds the others up: from what each costs itself, seen from outside.

All ranks take equally long for a step, since they wait for each other. What tells them apart is the
time that a rank does not wait: that its process used a core, was stopped, or was without data.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from launch.traces import STOPPED
from launch.watchdog import MAX_GAP

STEPS, SECONDS = 10, 10.0
"""That are compared together, at least: a look in 0.25 s says little of a short time."""
IN_A_ROW = 5
"""Comparisons that a rank is slow in before it is told of: on a busy machine each may be, once."""
RATIO = 1.5  # times the median
LEAST_SECONDS = 0.02  # a step: below, what rank 0 writes down makes the difference


@dataclass
class Stragglers:
    """Compares ranks again and again. No collective, and nothing that ranks would measure."""

    num_ranks: int
    slowest: int | None = None
    """The rank that was slow in the last comparison."""
    in_a_row: int = 0
    """Comparisons in which it was."""
    _first: int | None = None
    """The step with which the present comparison began."""
    _seconds: float = 0.0
    """How long it has gone on."""
    _cpu: list[float] = field(default_factory=list)
    _stopped: list[float] = field(default_factory=list)
    _starved: list[float] = field(default_factory=list)

    def look(self, places: list[dict[str, Any]], gap: float) -> str | None:
        """Take in what the places say `gap` seconds after the last look; return what is to be told
        of a rank, once it has been slow IN_A_ROW times, and not again before it was not."""
        step = min(int(place.get("step", 0)) for place in places)
        if step < 2:  # the first step compiles
            return None
        if self._first is None:
            self._begin(step, places)
        assert self._first is not None
        for rank, place in enumerate(places):
            if place.get("state") == STOPPED:
                self._stopped[rank] += min(gap, MAX_GAP)
            elif place.get("phase") == "data":
                self._starved[rank] += min(gap, MAX_GAP)
        self._seconds += gap
        if step - self._first < STEPS or self._seconds < SECONDS:
            return None
        told = self._compare(step, places)
        self._begin(step, places)
        return told

    def _begin(self, step: int, places: list[dict[str, Any]]) -> None:
        self._first, self._seconds = step, 0.0
        self._cpu = [_cpu_seconds(place) for place in places]
        self._stopped, self._starved = [0.0] * self.num_ranks, [0.0] * self.num_ranks

    def _compare(self, step: int, places: list[dict[str, Any]]) -> str | None:
        assert self._first is not None
        steps = step - self._first
        busy = [_cpu_seconds(place) - b for place, b in zip(places, self._cpu, strict=True)]
        own = [sum(each) / steps for each in zip(busy, self._stopped, self._starved, strict=True)]
        median, slowest = statistics.median_low(own), own.index(max(own))
        is_slow = own[slowest] > max(RATIO * median, median + LEAST_SECONDS)
        before = self.in_a_row if slowest == self.slowest else 0
        self.slowest, self.in_a_row = slowest, before + 1 if is_slow else 0
        if self.in_a_row != IN_A_ROW:
            return None
        return (
            f"rank {slowest} of {self.num_ranks} holds the others up, {IN_A_ROW} times in a row: "
            f"steps {self._first} to {step - 1} cost it {own[slowest]:.2f} s each, the median rank "
            f"{median:.2f} s (of all these steps {self._stopped[slowest]:.1f} s stopped, "
            f"{self._starved[slowest]:.1f} s without data); look at its core, memory and disk"
        )


def _cpu_seconds(place: dict[str, Any]) -> float:
    return float(place.get("cpu_seconds", 0.0))
