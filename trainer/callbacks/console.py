"""What a person sees while a run goes on: a banner, aligned lines, a progress bar on a terminal."""

import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.callbacks.protocol import Callback, RunView
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.validation.scores import QUESTION_ONLY

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Console:
    """One line per log point, evaluation and save."""

    progress_bar: bool = True
    """Draw a bar below the lines where the output is a terminal."""

    def build(self) -> "ConsoleCallback":
        return ConsoleCallback(self.progress_bar)


class ConsoleCallback(Callback):
    """Writes through logging, so that lines and bar share one screen."""

    def __init__(self, progress_bar: bool) -> None:
        self.wants_bar = progress_bar
        self.bar: Bar | None = None

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.view, self.max_steps = view, view.run.num_steps
        self.started, self.first_step = time.monotonic(), progress.step
        self.last_saved = progress.step
        for name, text in view.banner.items():
            log.info("%-8s%s", name, text)
        log.info("%-8s%s", "run", view.folder)
        if progress.step:
            log.info("%-8scontinues after step %d", "resume", progress.step)
        if view.is_main and self.wants_bar:
            self.bar = _start_bar(progress.step, self.max_steps)

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        skipped = metrics["skipped_steps"]
        mfu, images = metrics["mfu"], metrics.get("images_per_second")
        log.info(
            "%s | loss %7.4f | grad norm %8.4f | lr %.2e | %9s tok/s%s%s | %6.2f GiB | %s "
            "| ETA %s%s",
            self._step(progress.step),
            metrics["loss"],
            metrics["grad_norm"],
            metrics["lr"],
            f"{metrics['tokens_per_second']:,.0f}",
            f" | {images:,.1f} images/s" if images is not None else "",
            f" | MFU {mfu:.1%}" if mfu is not None else "",
            metrics["memory_gib"],
            self.view.loader.position(progress.step),
            self._eta(progress.step),
            f" | {skipped} steps skipped: the ledger says why" if skipped else "",
        )
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=progress.step)

    def on_eval(self, progress: Progress, metrics: dict[str, Any]) -> None:
        shown = {
            name: value
            for name, value in metrics.items()
            if name not in ("loss", "num_targets") and isinstance(value, float)
        }
        baseline = shown.pop(QUESTION_ONLY, None)
        texts = {name: f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items()}
        if baseline is not None:
            texts["exact_match"] += f" (question alone {baseline:.4f})"
        extra = " | ".join(texts.values())
        log.info("%s | loss %7.4f | %s", self._step(progress.step, "eval"), metrics["loss"], extra)

    def on_save(self, progress: Progress, saved: Saved) -> None:
        self.last_saved = saved.step
        log.info(
            "%s | saved %s in the background: %.2f s paused, %.1f s written",
            self._step(saved.step, "save"),
            saved.folder,
            saved.seconds_paused,
            saved.seconds_written,
        )

    def _saved_in_words(self, step: int) -> str:
        if not step:
            return "before its first step; the same command starts anew"
        if self.last_saved == step:
            return "and saved; the same command goes on from here"
        return f"without a save; the same command goes on after step {self.last_saved}"

    def on_rewind(self, view: RunView, progress: Progress) -> None:
        self.view, self.last_saved = view, progress.step
        self.started, self.first_step = time.monotonic(), progress.step
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=progress.step)

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        if self.bar:
            self.bar.stop()
        elapsed = timedelta(seconds=round(time.monotonic() - self.started))
        verdict = (
            f"finished after {elapsed}"
            if finished
            else f"stopped after {elapsed} {self._saved_in_words(progress.step)}"
        )
        log.info("%s | %s", self._step(progress.step), verdict)

    def _step(self, step: int, kind: str = "step") -> str:
        width = len(str(self.max_steps))
        return f"{kind} {step:>{width}}/{self.max_steps}"

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        left = (self.max_steps - step) * (time.monotonic() - self.started) / max(1, done)
        return str(timedelta(seconds=round(left)))


def _start_bar(step: int, max_steps: int) -> "Bar | None":
    import rich
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = rich.get_console()
    if not console.is_terminal:
        return None
    bar = Bar(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    bar.add_task("training", completed=step, total=max_steps)
    bar.start()
    return bar
