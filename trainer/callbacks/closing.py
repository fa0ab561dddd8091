"""The end of a run: a sample of what was learnt, a card, where things are, what to try next."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.callbacks.card import card, next_commands
from trainer.callbacks.protocol import Callback, RunView
from trainer.generation import sample
from trainer.notes import REPORT, SAMPLE, write_note
from trainer.points import METRICS, read_points
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.screen import labelled, width
from trainer.validation.spec import VALIDATION

log = logging.getLogger(__name__)
CONTENTS = {
    "model": "opens in transformers as it is",
    "adapter": "opens in peft as it is",
    "trained": "what trained, and which base it belongs to",
}


@dataclass(frozen=True, kw_only=True)
class Closing:
    """Print a generated sample, how the run went, what was saved, and the next commands."""

    prompt: str = ""
    """Text that the sample continues."""
    sample_tokens: int = 0
    """Length of the sample in tokens; 0: none."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    next_commands: tuple[str, ...] = ()
    """Commands to try next; `{run}` stands for the run's folder. Empty: those that any run has."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 0 or self.temperature < 0:
            raise ValueError("callbacks.closing: set sample_tokens and temperature to 0 or more")
        if self.sample_tokens and not self.prompt:
            raise ValueError("callbacks.closing.sample_tokens needs a text to continue; set prompt")

    def build(self) -> "ClosingCallback":
        return ClosingCallback(self)


class ClosingCallback(Callback):
    """Samples on every rank, prints on rank 0."""

    def __init__(self, spec: Closing) -> None:
        self.spec = spec
        self.checkpoint: Path | None = None

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.view, self.first_step, self.started = view, progress.step, time.monotonic()

    def on_save(self, progress: Progress, saved: Saved) -> None:
        self.checkpoint = saved.folder or self.checkpoint

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        seconds = time.monotonic() - self.started  # without the sample
        if finished and self.spec.sample_tokens:
            text = self._sample()
            if self.view.is_main:
                said = {
                    "step": progress.step,
                    "temperature": self.spec.temperature,
                    "prompt": self.spec.prompt,
                    "text": text,
                }
                write_note(self.view.folder, SAMPLE, said)
            log.info("\nsample at temperature %s:", self.spec.temperature)
            log.info("%s", "\n".join(f"  | {line}" for line in text.splitlines()))
        if not self.view.is_main:
            return
        run, folder = self.view.run, self.view.folder
        lines = card(
            read_points(folder), run.best, name=folder.name, step=progress.step,
            max_steps=run.num_steps, seconds=seconds, first_step=self.first_step,
            finished=finished,
        )  # fmt: skip
        log.info("")
        for name, text in lines.items():
            log.info("%s", labelled(name, text))
        self._say_places()
        commands = [command.replace("{run}", str(folder)) for command in self.spec.next_commands]
        if not finished:
            commands = ["the same command again goes on from here"]
        elif not commands:
            commands = [*next_commands(folder, run.asks), f"tessera report run={folder}"]
        log.info("\nnext:")
        for command in commands:
            log.info("  %s", command)

    def _say_places(self) -> None:
        folder = self.view.folder
        log.info("\nsaved:")
        if self.checkpoint is not None:
            for name, note in CONTENTS.items():
                if (self.checkpoint / name).exists():
                    log.info("%s", _place(name, self.checkpoint / name, note))
            log.info("  %-12s %s", "checkpoint", self.checkpoint)
            best = self.checkpoint.with_name("best")
            if best.is_file():
                log.info("  %-12s %s", "best", best.with_name(best.read_text().strip()))
        if (folder / VALIDATION).is_file():
            log.info("  %-12s %s", "answers", folder / VALIDATION)
        log.info("  %-12s %s", "metrics", folder / METRICS)
        log.info("  %-12s %s", "config", folder / "config.yaml")
        log.info("  %-12s %s", "report", folder / REPORT)

    def _sample(self) -> str:
        tokenizer = self.view.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = sample(
            self.view.engine,
            [*start, *tokenizer.encode(self.spec.prompt)],
            num_tokens=self.spec.sample_tokens,
            temperature=self.spec.temperature,
            max_context=self.view.loader.rows.row_tokens,
            stop_token_id=tokenizer.eos_token_id,
            seed=self.view.run.seed,
            virtual_ids=self.view.run.virtual_ids,
        )
        return tokenizer.decode(ids)


def _place(name: str, path: Path, note: str) -> str:
    """Return a line on a folder; a narrow terminal gets the path alone, which can be copied."""
    line, columns = f"  {name:<12} {path}", width()
    whole = f"{line}  ({note})"
    return whole if columns is None or len(whole) <= columns else line
