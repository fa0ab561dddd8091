"""The line below all lines on a terminal: how far the run is, and how long it will still take."""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.points import TOKENS
from trainer.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

REDRAWS_PER_SECOND = 2  # beside the training, which has the cores
MIN_BAR = 10  # columns


@dataclass(kw_only=True)
class Pace:
    """How long the rest takes, by the time between log points.

    The first of them ends a step that is like no other: it compiles and fills caches.
    """

    step: int
    """The last step that a log point has seen."""
    max_steps: int
    time: float = field(default_factory=time.monotonic)
    """When it was seen."""
    _from: tuple[int, float] | None = None
    seconds_a_step: float | None = None
    _seen: tuple[int, float] = (0, 0.0)

    def note(self, step: int) -> None:
        """Take a log point in."""
        now = time.monotonic()
        first_step, began = self._from or (self.step, self.time)
        if step > first_step:
            self.seconds_a_step = (now - began) / (step - first_step)
        self._from = self._from or (step, now)
        self.step, self.time = step, now

    def rewind(self, step: int) -> None:
        """Go on from an older step; what was measured still holds."""
        self.step, self.time, self._from = step, time.monotonic(), None

    def left(self, step: int) -> str:
        """Return the time that is left after `step`, which may lie behind the last log point.

        It goes down while a step lasts, but not while an evaluation does.
        """
        if self.seconds_a_step is None:
            return "-:--:--"
        now = time.monotonic()
        if step != self._seen[0]:
            self._seen = step, now
        begun = min(now - self._seen[1], self.seconds_a_step)
        rest = (self.max_steps - step) * self.seconds_a_step - begun
        return str(timedelta(seconds=round(max(0.0, rest))))


class StatusLine:
    """Drawn by a thread of rank 0 from numbers that are on the host: no step waits for it."""

    def __init__(self, progress: Progress, pace: Pace) -> None:
        from rich.live import Live

        self.progress, self.pace = progress, pace
        self.numbers = ""
        self._live: Live = Live(
            get_renderable=self.draw, transient=True, refresh_per_second=REDRAWS_PER_SECOND
        )
        self._live.start()

    def note(self, metrics: dict[str, Any]) -> None:
        """Show the numbers of a log point."""
        self.numbers = f"loss {metrics['loss']:.4f}  {metrics[TOKENS]:,.0f} tok/s  "

    def draw(self) -> "Table":
        """Return what is shown now: the step is that of the host, which reads nothing back."""
        import rich
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        step, last = self.progress.step, self.pace.max_steps
        text = f" {step}/{last}  {self.numbers}ETA {self.pace.left(step)}"
        columns = rich.get_console().width - len("^C ")  # which would make the line wrap
        bar = ProgressBar(total=last, completed=step, width=max(MIN_BAR, columns - len(text)))
        line = Table.grid()
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="crop")
        line.add_row(bar, text)
        return line

    def stop(self) -> None:
        """Leave an empty line in its place."""
        self._live.stop()
