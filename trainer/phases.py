"""One engine after another, where what trains changes between two steps."""

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.nn.cache import Cache
from models.nn.head import Loss
from trainer.batch import Batch
from trainer.flops import training_flops
from trainer.parallel.materialise import Values
from trainer.pieces import Piece
from trainer.progress import Stopwatch
from trainer.protocols import Engine, StepResult
from trainer.run import Run
from trainer.trained import Trained

log = logging.getLogger(__name__)
Build = Callable[[nn.Module, Values | None], Engine]
"""Returns the engine of a planned model that starts from these values, or from the run's."""


class PhasedEngine:
    """The Engine protocol over the engine of the present phase.

    A group with `unfreeze_at: N` trains from step N + 1 on. The checkpoint of step N belongs to the
    phase before, so that going on from it and never having stopped are the same: a change.
    """

    def __init__(self, run: Run, build: Build, stopwatch: Stopwatch) -> None:
        """`stopwatch` is paused while engines change. Nothing is built before `at`."""
        self.run, self.build, self.stopwatch = run, build, stopwatch
        self.borders, self.phase = run.freeze.borders, 0
        self.on_change: Callable[[Trained], None] = lambda trained: None
        """Told what trains, at each change."""
        self._engine: Engine | None = None

    def at(self, step: int) -> "PhasedEngine":
        """Be the engine that trains step `step` and is saved after it. Collective."""
        phase = bisect_left(self.borders, step)
        if self._engine is None:
            self._engine = self._build(step, None)
        elif phase < self.phase:  # a rewind: a checkpoint is loaded next
            self._let_go()
            self._engine = self._build(step, None)
        elif phase > self.phase:
            with self.stopwatch.paused():
                self._change(step)
            log.info("step %d on | trains %s", step, self.trained.describe())
            self.on_change(self.trained)
        self.phase = phase
        return self

    def _build(self, step: int, values: Values | None) -> Engine:
        model = self.run.trained_model(step)
        self.trained = Trained.of(self.run.freeze, model, step)
        spec = self.run.model
        self.flops = training_flops(
            model, spec.layout, spec.attention_width, self.run.data.row_tokens
        )
        return self.build(model, values)

    @torch.no_grad()
    def _change(self, step: int) -> None:
        """Go on with a new engine: weights and optimizer state stay, what now trains gets fresh
        state."""
        old = self._now
        # On the host: old and new engine at once may not fit a GPU.
        kept = {n: p.local.cpu() for n, p in (old.weights() | old.optimizer_state()).items()}
        del old
        self._let_go()
        engine = self._build(step, _zeros)
        # Of the same mesh: new pieces lie as the old ones did.
        pieces = engine.weights() | engine.optimizer_state()
        for name, values in kept.items():
            pieces[name].local.copy_(values)
        engine.loaded()
        self._engine = engine

    def _let_go(self) -> None:
        self._now.close()
        self._engine = None
        gc.collect()  # wrapped modules are cycles: their memory is free before it is needed again

    @property
    def _now(self) -> Engine:
        assert self._engine is not None, "at() comes first"
        return self._engine

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        return self.at(step)._now.train_step(step, micro_batches, num_tokens)

    def eval_step(self, batch: Batch) -> Loss:
        return self._now.eval_step(batch)

    def logits(self, batch: Batch) -> Tensor:
        return self._now.logits(batch)

    def new_cache(self) -> Cache | None:
        return self._now.new_cache()

    def next_logits(self, batch: Batch, cache: Cache | None) -> Tensor:
        return self._now.next_logits(batch, cache)

    def weights(self) -> dict[str, Piece]:
        return self._now.weights()

    def optimizer_state(self) -> dict[str, Piece]:
        return self._now.optimizer_state()

    @property
    def writes(self) -> bool:
        return self._now.writes

    def loaded(self) -> None:
        self._now.loaded()

    def close(self) -> None:
        self._now.close()


def _zeros(name: str, start: int, stop: int) -> Tensor:
    """Hold the place of values that are copied in afterwards."""
    return torch.zeros(stop - start)
