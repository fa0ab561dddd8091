"""What a person sees while a run goes on: a banner, aligned lines, a status line on a terminal."""

import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainer.callbacks.card import extent_in_words
from trainer.callbacks.protocol import Callback, RunView
from trainer.callbacks.status import Pace, StatusLine
from trainer.points import TOKENS
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.screen import columns_of, labelled, rows_of, width
from trainer.validation.scores import QUESTION_ONLY

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Console:
    """One line per log point, evaluation and save."""

    progress_bar: bool = True
    """Draw a bar with step, loss, tokens/s and ETA below the lines where stdout is a terminal."""

    def build(self) -> "ConsoleCallback":
        return ConsoleCallback(self.progress_bar)


class ConsoleCallback(Callback):
    """Writes through logging, so that lines and status line share one screen."""

    def __init__(self, progress_bar: bool) -> None:
        self.wants_bar = progress_bar
        self.status: StatusLine | None = None

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.view, self.max_steps = view, view.run.num_steps
        self.started = time.monotonic()
        self.pace = Pace(step=progress.step, max_steps=self.max_steps)
        self.last_saved = progress.step
        banner = {} if view.is_again else {**view.banner, "run": str(view.folder)}
        where = f"goes on after step {progress.step}" if progress.step else "begins anew"
        for name, text in {**banner, "start": f"{view.start} {where}"}.items():
            log.info("%s", labelled(name, text))
        if view.is_main and self.wants_bar and width() is not None:
            self.status = StatusLine(progress, self.pace)

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        self.pace.note(progress.step)
        skipped, mfu, images = (
            metrics.get(name) for name in ("skipped_steps", "mfu", "images_per_second")
        )
        cells = [
            self._step(progress.step),
            f"loss {metrics['loss']:7.4f}",
            f"grad norm {metrics['grad_norm']:8.4f}",
            f"lr {metrics['lr']:.2e}",
            f"{metrics[TOKENS]:9,.0f} tok/s",
            *([f"{images:,.1f} images/s"] if images is not None else []),
            *([f"MFU {mfu:.1%}"] if mfu is not None else []),
            f"{metrics['memory_gib']:6.2f} GiB",
            self.view.loader.position(progress.step),
            *([] if self.status else [f"ETA {self.pace.left(progress.step)}"]),
        ]
        notes = [f"{skipped} steps skipped: the ledger says why"] if skipped else []
        log.info("%s", columns_of(cells, *notes))
        if self.status:
            self.status.note(metrics)

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
        read = extent_in_words(metrics)
        cells = [f"loss {metrics['loss']:7.4f}", *texts.values(), *([f"on {read}"] if read else [])]
        log.info("%s", rows_of(self._step(progress.step, "eval"), cells))

    def on_save(self, progress: Progress, saved: Saved) -> None:
        self.last_saved = saved.step
        step = self._step(saved.step, "save")
        took = f"{saved.seconds_paused:.2f} s paused", f"{saved.seconds_written:.1f} s written"
        if width() is None:
            log.info("%s | saved %s in the background: %s, %s", step, saved.folder, *took)
        elif saved.folder is not None:  # the banner says where the run is
            place = saved.folder.relative_to(self.view.folder)
            log.info("%s", columns_of([step, f"saved {place}", *took]))

    def _saved_in_words(self, step: int) -> str:
        if not step:
            return "before its first step; the same command starts anew"
        if self.last_saved == step:
            return "and saved; the same command goes on from here"
        return f"without a save; the same command goes on after step {self.last_saved}"

    def on_rewind(self, view: RunView, progress: Progress) -> None:
        self.view, self.last_saved = view, progress.step
        self.pace.rewind(progress.step)

    def on_close(self) -> None:
        if self.status:
            self.status.stop()

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        elapsed = timedelta(seconds=round(time.monotonic() - self.started))
        verdict = f"finished after {elapsed}"
        if not finished:
            verdict = f"stopped after {elapsed} {self._saved_in_words(progress.step)}"
        log.info("%s", columns_of([self._step(progress.step)], verdict))

    def _step(self, step: int, kind: str = "step") -> str:
        digits = len(str(self.max_steps))
        return f"{kind} {step:>{digits}}/{self.max_steps}"
