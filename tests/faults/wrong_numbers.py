"""A tiny run whose numbers go wrong: test-side specs over real code paths.

Gradients and losses go wrong on one rank at one step; batches of nonsense wherever they are met.
"""

import hashlib
import os
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.nn.head import IGNORED, Loss
from tests.runs import tiny_run
from trainer.batch import Batch
from trainer.callbacks.protocol import Callback, RunView
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import Step, StepLoader
from trainer.data.pretraining import PretrainingData
from trainer.engines.native import NativeEngine
from trainer.engines.native_trainer import NativeTrainer
from trainer.engines.protocol import Surroundings
from trainer.parallel.laid_out import LaidOut
from trainer.pieces import Piece
from trainer.progress import Progress
from trainer.protocols import Engine
from trainer.run import Run

At = tuple[tuple[int, int], ...]
"""Pairs of a rank and a step."""


@dataclass(frozen=True, kw_only=True)
class WrongEngine(NativeEngine):
    """The native engine; the last micro-batch of some steps of some ranks has wrong numbers."""

    nan_gradient: At = ()
    """The loss is finite, its gradient is not."""
    infinite_loss: At = ()
    """The gradient is finite, the loss is not."""

    def build(self, laid_out: LaidOut, around: Surroundings) -> NativeTrainer:
        engine = super().build(laid_out, around)
        passes: Any = engine.passes
        loss_of, train, steps = passes._loss, passes.train, [0]

        def loss(batch: Batch, scale: Tensor) -> Loss:
            found: Loss = loss_of(batch, scale)
            place = (around.mesh.dp_rank, steps[0])
            if place in self.nan_gradient:
                found = found._replace(objective=found.objective * torch.nan)
            if place in self.infinite_loss:
                found = found._replace(sum=found.sum + torch.inf)
            return found

        def trained(step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
            steps[0] = step
            sums: Tensor = train(step, micro_batches, scale)
            steps[0] = 0
            return sums

        passes._loss, passes.train = loss, trained
        return engine


@dataclass(frozen=True, kw_only=True)
class NonsenseLoader(StepLoader):
    """Some samples are answered by random bytes that no text has."""

    nonsense: Container[int]

    def step(self, number: int) -> Step:
        step = super().step(number)
        for batch, (first, last) in zip(step.micro_batches, step.ranges, strict=True):
            for row, sample in enumerate(range(first, last)):
                if sample in self.nonsense:
                    generator = torch.Generator().manual_seed(sample)
                    random = torch.randint(128, 256, batch.labels[row].shape, generator=generator)
                    is_target = batch.labels[row] != IGNORED
                    batch.labels[row] = torch.where(is_target, random, IGNORED)
        return step


@dataclass(frozen=True, kw_only=True)
class NonsenseData(PretrainingData):
    """Builds that loader."""

    nonsense: Container[int]

    def build(self, **settings: Any) -> tuple[StepLoader, EvalLoader | None]:
        loader, eval_loader = super().build(**settings)
        return NonsenseLoader(**vars(loader), nonsense=self.nonsense), eval_loader


@dataclass(frozen=True, kw_only=True)
class ShiftedLoader(StepLoader):
    """From a step on reads what belongs to later steps."""

    after: int
    by: int

    def step(self, number: int) -> Step:
        return super().step(number + self.by if number >= self.after else number)


@dataclass(frozen=True, kw_only=True)
class ShiftedData(PretrainingData):
    """Builds that loader: the slow and obvious way to pass samples over."""

    after: int
    by: int

    def build(self, **settings: Any) -> tuple[StepLoader, EvalLoader | None]:
        loader, eval_loader = super().build(**settings)
        return ShiftedLoader(**vars(loader), after=self.after, by=self.by), eval_loader


def nonsense_run(cache: Path, nonsense: Container[int], **changes: Any) -> Run:
    """Return a tiny run in which those samples are nonsense."""
    run = tiny_run(cache, **({"data_micro_rows": 1} | changes))
    return replace(run, data=NonsenseData(**vars(run.data), nonsense=nonsense))


class Hashes(Callback):
    """Writes a hash of this rank's weights and optimizer state after each step into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self) -> "Hashes":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.engine: Engine = view.engine
        self.rank = torch.distributed.get_rank()

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        state = self.engine.weights() | self.engine.optimizer_state()
        name = f"{self.rank}.{progress.step}"
        (self.folder / name).write_text(hash_of(state))


def hash_of(state: dict[str, Piece]) -> str:
    digest = hashlib.blake2b()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].local.detach().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class KilledOnce(Callback):
    """Ends every rank at a step, as `kill -9` would, the first time that it is reached twice."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def build(self) -> "KilledOnce":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step != self.step:
            return
        mark = self.folder / f"seen.{torch.distributed.get_rank()}"
        times = len(mark.read_text()) if mark.exists() else 0
        mark.write_text("x" * (times + 1))
        if times == 1:
            os._exit(9)
