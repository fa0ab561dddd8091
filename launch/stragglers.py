"""Which rank holds the others up: from what each costs itself, seen from outside.

All ranks take equally long for a step, since they wait for each other. What tells them apart is the
time that a rank does not wait: that its process used a core, was stopped, or was without data.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from launch.traces import STOPPED
from launch.watchdog import MAX_GAP

STEPS = 20  # that are compared together
RATIO = 1.3  # times the median
LEAST_SECONDS = 0.02  # a step: below, what rank 0 writes down makes the difference


@dataclass
class Stragglers:
    """Compares ranks over each STEPS steps. No collective, and nothing that ranks would measure."""

    num_ranks: int
    _first: int | None = None
    """The step with which the present comparison began."""
    _cpu: list[float] = field(default_factory=list)
    _stopped: list[float] = field(default_factory=list)
    _starved: list[float] = field(default_factory=list)

    def look(self, places: list[dict[str, Any]], gap: float) -> str | None:
        """Take in what the places say `gap` seconds after the last look; return what is to be told
        of the last STEPS steps, if they are done."""
        step = min(int(place.get("step", 0)) for place in places)
        if step < 2:  # the first step compiles
            return None
        if self._first is None:
            self._begin(step, places)
        for rank, place in enumerate(places):
            if place.get("state") == STOPPED:
                self._stopped[rank] += min(gap, MAX_GAP)
            elif place.get("phase") == "data":
                self._starved[rank] += min(gap, MAX_GAP)
        assert self._first is not None
        if step - self._first < STEPS:
            return None
        told = self._compare(step, places)
        self._begin(step, places)
        return told

    def _begin(self, step: int, places: list[dict[str, Any]]) -> None:
        self._first = step
        self._cpu = [_cpu_seconds(place) for place in places]
        self._stopped, self._starved = [0.0] * self.num_ranks, [0.0] * self.num_ranks

    def _compare(self, step: int, places: list[dict[str, Any]]) -> str | None:
        assert self._first is not None
        steps = step - self._first
        busy = [_cpu_seconds(place) - b for place, b in zip(places, self._cpu, strict=True)]
        own = [sum(each) / steps for each in zip(busy, self._stopped, self._starved, strict=True)]
        median, slowest = (
            statistics.median_low(own),
            max(range(self.num_ranks), key=own.__getitem__),
        )
        if own[slowest] <= max(RATIO * median, median + LEAST_SECONDS):
            return None
        return (
            f"rank {slowest} of {self.num_ranks} holds the others up: steps {self._first} to "
            f"{step - 1} cost it {own[slowest]:.2f} s each, the median rank {median:.2f} s "
            f"(of all these steps {self._stopped[slowest]:.1f} s stopped, "
            f"{self._starved[slowest]:.1f} s without data); look at its core, memory and disk"
        )


def _cpu_seconds(place: dict[str, Any]) -> float:
    return float(place.get("cpu_seconds", 0.0))
