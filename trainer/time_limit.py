"""When a run has to end by itself, so that its last save still fits before the end."""

import math
import re
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_STEPS_LATE = 2  # what a rank says after a step is acted upon after the next one
_SAVE_FACTOR = 1.5  # of the slowest of twenty saves: the next one may be slower
UNKNOWN_SAVE_SECONDS = 5.0  # before the first one was measured
LEAVING_SECONDS = 5.0  # from the end of the last save to the end of the command
_LEAVING_SHARE = 0.1  # of a short limit: it is not spent on leaving
_KEPT = 100  # durations that are remembered


def end_of(text: str, now: datetime) -> datetime:
    """Return the moment that `stop_at` means, `now` being the start; ValueError for no moment."""
    relative = re.fullmatch(r"\+(\d+(?:\.\d+)?)([smhd])", text)
    try:
        if relative:
            number, unit = relative.groups()
            return now + timedelta(seconds=float(number) * _UNITS[unit])
        # Without a zone: that of this machine.
        return datetime.fromisoformat(text).astimezone(now.tzinfo)
    except (ValueError, OverflowError):  # no date, or one behind the year 9999
        raise ValueError(
            f"stop_at={text!r} is no time; set it to +90s, +30m, +12h or +2d from the start, "
            "or to a time like 2030-12-31T08:00"
        ) from None


class TimeLimit:
    """How much time is left for steps and saves, against what they take.

    Durations are those of the monotonic clock: a clock that is set changes nothing.
    """

    def __init__(
        self, seconds_left: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        leaving = min(LEAVING_SECONDS, _LEAVING_SHARE * seconds_left)
        self._end = clock() + max(0.0, seconds_left - leaving)
        self._steps: deque[float] = deque(maxlen=_KEPT)
        self._saves: deque[float] = deque(maxlen=_KEPT)

    def took(self, *, step: float | None = None, save: float | None = None) -> None:
        """Learn how long a step or a save took, in seconds."""
        has_end = math.isfinite(self._end)  # else nobody asks, and each step would sort a hundred
        for value, known in ((step, self._steps), (save, self._saves)):
            if value is not None and has_end:
                known.append(value)

    @property
    def seconds_left(self) -> float:
        return self._end - self._clock()

    @property
    def save_seconds(self) -> float:
        """What a save is expected to take at most."""
        return _SAVE_FACTOR * _p95(self._saves) if self._saves else UNKNOWN_SAVE_SECONDS

    @property
    def is_near(self) -> bool:
        """Whether it is time to stop and save."""
        return self.seconds_left <= _STEPS_LATE * _p95(self._steps) + self.save_seconds

    @property
    def is_too_late(self) -> bool:
        """Whether a save after one more step would not end in time, by the ones that were
        measured."""
        needed = _p95(self._steps) + _p95(self._saves)
        return bool(self._saves) and self.seconds_left < needed


def _p95(values: "deque[float]") -> float:
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0
