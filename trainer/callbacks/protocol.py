"""Listeners of the loop: optional things only. What must be ordered is code in the loop."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import StepLoader
from trainer.data.tokenizers import Tokenizer
from trainer.progress import Progress
from trainer.protocols import Engine, Saved

if TYPE_CHECKING:
    from trainer.run import Run  # which lists callbacks itself


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a callback may look at."""

    run: "Run"
    folder: Path
    start: int
    """Which start of the run this is, from 1."""
    is_again: bool
    """Whether the same command has told of an earlier one."""
    is_main: bool
    engine: Engine
    tokenizer: Tokenizer
    loader: StepLoader
    eval_loader: EvalLoader | None
    banner: dict[str, str]
    """What is about to run, in words: model, layout, batch, formula of FLOPs."""


class Callback:
    """Called on every rank; override what is of interest. May run collectives if all ranks do."""

    def on_start(self, view: RunView, progress: Progress) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        """At each log point, with the line that went into metrics.jsonl."""

    def on_eval(self, progress: Progress, metrics: dict[str, Any]) -> None:
        """After each evaluation, with the line that went into metrics.jsonl."""

    def on_save(self, progress: Progress, saved: Saved) -> None:
        """After a checkpoint was committed, maybe of an earlier step: it is written meanwhile."""

    def on_rewind(self, view: RunView, progress: Progress) -> None:
        """After the run went back to an older step; `view` has the loader that it goes on with."""

    def on_close(self) -> None:
        """When no step will follow, also after a failure: local things only, no collectives."""

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        """After the last step and save; `finished` is False when a signal ended the run early."""


class CallbackSpec(Protocol):
    """A callback's settings."""

    def build(self) -> Callback: ...


@runtime_checkable
class CheckedSpec(CallbackSpec, Protocol):
    """Settings of a callback that does not fit every run."""

    def check(self, run: "Run") -> None:
        """Raise ValueError for a run that it does not fit, before any process starts."""
        ...
