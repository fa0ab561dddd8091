"""When saves that fail end a run: too many of them in a row, or too long without a good one."""

import time
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.writer import free_bytes
from trainer.sizes import on_disk

MAX_IN_A_ROW = 3


class Failures:
    """The failed saves since the last good one. Time counts from the first: before, none is due."""

    def __init__(
        self, max_minutes: float | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_minutes, self._now = max_minutes, now
        self.in_a_row = 0
        self._since = 0.0

    def add(self) -> None:
        """A save failed."""
        if not self.in_a_row:
            self._since = self._now()
        self.in_a_row += 1

    def clear(self) -> None:
        """A save was good."""
        self.in_a_row = 0

    @property
    def minutes(self) -> float:
        """Minutes since the first failure in a row; 0: there is none."""
        return (self._now() - self._since) / 60 if self.in_a_row else 0.0

    @property
    def is_late(self) -> bool:
        """Whether the time is over: one more save is tried at once, and is the last if it fails."""
        return bool(self.in_a_row) and self.minutes >= (self.max_minutes or float("inf"))

    def last_words(self, reason: str, folder: Path, needed: int) -> str:
        """Say why the run ends: `needed` are the bytes of a checkpoint in `folder`."""
        return (
            f"{self.in_a_row} saves in a row failed within {self.minutes:.0f} minutes, the last "
            f"one: {reason}; a checkpoint needs {on_disk(needed)}, {folder} has "
            f"{on_disk(free_bytes(folder))} free"
        )
