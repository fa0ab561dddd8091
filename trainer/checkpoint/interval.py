"""How often a run saves by the clock: as often as it pays, by what a save and a failure cost."""

import math
import time
from collections.abc import Callable

from trainer.checkpoint.spec import AUTO_INTERVAL, CheckpointSpec

# Of Llama 3 (Dubey et al. 2024, section 3.3.4): 419 stops in 54 days on 16,384 H100.
GPU_HOURS_PER_FAILURE = 50_700.0
FIRST_SECONDS = 600.0  # at most, up to the first save: only then its cost is known
SHARE_OF_WRITING = 0.5  # at most, of the time


def best_interval(cost: float, mtbf: float) -> float:
    """Return the seconds between saves that lose least: Young 1974, Daly 2006, first order.

    A save costs `cost` seconds of training; failures come every `mtbf` seconds on average.
    """
    return math.sqrt(2 * cost * mtbf)


class Clock:
    """Says when the next save is due; rank 0's decides for all."""

    def __init__(
        self, spec: CheckpointSpec, num_ranks: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.interval, self._now = spec.interval, now
        hours = spec.mtbf_hours or GPU_HOURS_PER_FAILURE / num_ranks
        self.mtbf = 3600 * hours
        self._began = now()
        self._cost: float | None = None
        self._written = 0.0

    @property
    def seconds(self) -> float:
        """Seconds from the start of a save to that of the next one; infinite: by steps alone."""
        if self.interval is None:
            return math.inf
        if self.interval != AUTO_INTERVAL:
            return float(self.interval)
        if self._cost is None:
            return min(FIRST_SECONDS, best_interval(1.0, self.mtbf))
        return max(best_interval(self._cost, self.mtbf), self._written / SHARE_OF_WRITING)

    @property
    def is_due(self) -> bool:
        return self._now() - self._began >= self.seconds

    def start(self) -> None:
        """A save begins."""
        self._began = self._now()

    def took(self, *, paused: float, written: float) -> None:
        """Learn what a save cost; of a few the dearest counts, and is forgotten slowly."""
        self._cost = max(paused, 0.9 * (self._cost or 0.0))
        self._written = max(written, 0.9 * self._written)
