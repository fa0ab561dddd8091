"""What a person sees while texts become tokens: a bar on a terminal, else a line now and then."""

import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)
_LINE_SECONDS, _BAR_SECONDS = 10.0, 0.2


class TokeniseProgress:
    """Counts what was done; shows nothing of work that is over within seconds."""

    def __init__(self, what: str, total_bytes: int | None) -> None:
        """`total_bytes`: of all texts; None: unknown, or not what documents are counted in."""
        self.what, self.total_bytes = what, total_bytes
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self.seconds = 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> "TokeniseProgress":
        self._started = self._shown = time.monotonic()
        self._bar = _start_bar(self.what, self.total_bytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._started
        if self._bar:
            self._bar.stop()

    def advance(self, num_tokens: int, num_bytes: int) -> None:
        """Count one more document."""
        self.num_documents += 1
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        now = time.monotonic()
        if now - self._shown >= (_BAR_SECONDS if self._bar else _LINE_SECONDS):
            self._shown, self.seconds = now, now - self._started
            self._show()

    def rate(self) -> float:
        """Return bytes of text per second so far."""
        return self.num_bytes / self.seconds if self.seconds else 0.0

    def _show(self) -> None:
        speed = (
            f"{self.rate() / 1e6:.2f} MB/s"
            if self.total_bytes
            else f"{self.num_documents / self.seconds:,.0f} documents/s"
        )
        text = f"{self.num_tokens:,} tokens, {speed}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.num_bytes, text=text)
            return
        share = f" ({self.num_bytes / self.total_bytes:.0%})" if self.total_bytes else ""
        log.info(
            "tokenising %s: %s documents, %s%s", self.what, f"{self.num_documents:,}", text, share
        )


def _start_bar(what: str, total_bytes: int | None) -> "Bar | None":
    import rich
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = rich.get_console()
    if not console.is_terminal:
        return None
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Bar(*columns, console=console, transient=True)
    bar.add_task(f"tokenising {what}", total=total_bytes, text="")
    bar.start()
    return bar
