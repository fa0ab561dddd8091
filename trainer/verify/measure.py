"""What one layout computes: loss, every gradient, norm, updates, a curve, and a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from trainer.adapters.contents import contents_of
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.lock import RunLock
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.files import write_json
from trainer.mesh import Mesh
from trainer.optim import SGD, AdamW, OptimSpec
from trainer.protocols import Engine, StepResult
from trainer.run import Run
from trainer.verify.rows import MadeRows
from trainer.verify.whole import Tensors, whole

SAVED_STEP = 3
TIMEOUT_SECONDS = 30.0
CLIP = 0.1  # far below the norm of a fresh model's gradient, so that clipping acts
ADAM_EPS = 1e-3  # large enough that a gradient of nothing but rounding moves no weight
Fault = Callable[[Engine], None]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a layout."""

    run: Run
    """With the layout's mesh and engine."""
    rows: MadeRows
    steps: int = 20
    """Length of the curve; 0: none, and no checkpoint."""
    folder: Path | None = None
    """Where this layout saves."""
    resumed: Path | None = None
    """What another layout saved."""
    fault: Fault | None = None
    """Breaks the engine on purpose."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a layout computed, by kind; tensors are whole."""

    kinds: dict[str, Tensors] = field(default_factory=dict)
    complaints: tuple[str, ...] = ()
    """Where ranks hold different copies of the same numbers, or none at all."""


def answer(placement: Placement, question: Question) -> Answer:
    """Return what this rank's layout computes: rank 0 all of it, the others nothing. Collective."""
    ranks = Ranks(placement, TIMEOUT_SECONDS)
    mesh = question.run.mesh.build(ranks=ranks)
    asked = _Asked(question, ranks, mesh)
    kinds = asked.one_step()
    if question.steps:
        kinds |= asked.curve()
    if question.resumed is not None:
        kinds |= asked.resumed(question.resumed)
    ranks.barrier()
    ranks.close()
    return Answer(kinds=kinds if placement.is_main else {}, complaints=tuple(asked.complaints))


class _Asked:
    def __init__(self, question: Question, ranks: Ranks, mesh: Mesh) -> None:
        self.question, self.run, self.ranks, self.mesh = question, question.run, ranks, mesh
        self.complaints: list[str] = []

    def one_step(self) -> dict[str, Tensors]:
        """Loss, gradients and norm of the first step; weights after an SGD and an AdamW update."""
        # Without momentum, Adam's first moment is the gradient itself, on every engine.
        adam = self._engine(AdamW(lr=1e-3, betas=(0.0, 0.95), eps=ADAM_EPS, max_grad_norm=None))
        result = self._step(adam, 1)
        state = adam.optimizer_state()
        moments = {n.partition("/")[2]: p for n, p in state.items() if n.startswith("exp_avg/")}
        sgd = self._engine(SGD(lr=0.1, max_grad_norm=CLIP))
        self._step(sgd, 1)
        kinds = {
            "loss": _loss(result),
            "gradients": self._whole(moments),
            "norm": _norm(result),
            "SGD": self._whole(sgd.weights()),
            "AdamW": self._whole(adam.weights()),
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors is not None}

    def curve(self) -> dict[str, Tensors]:
        """Losses and norms of a short run, saved on its way."""
        engine = self._engine(self.run.optim)
        losses, norms, kinds = [], [], {}
        for step in range(1, self.question.steps + 1):
            result = self._step(engine, step)
            losses.append(float(result.loss_sum / result.num_targets))
            norms.append(float(result.grad_norm))
            if step == SAVED_STEP and self.question.folder is not None:
                kinds["saved"] = self._state(engine)
                self._checkpoints(self.question.folder).save(step, engine, {}, is_last=True)
            if step == SAVED_STEP + 1:
                kinds["next"] = self._whole(engine.weights()) or {}
        return kinds | {"curve": {"loss": np.array(losses), "norm": np.array(norms)}}

    def resumed(self, folder: Path) -> dict[str, Tensors]:
        """What the checkpoint of another layout gives here, and the weights one step on."""
        engine = self._engine(self.run.optim)
        state = self._checkpoints(folder).restore(lambda _: engine, [SAVED_STEP])
        assert state is not None
        loaded = self._state(engine)
        self._step(engine, SAVED_STEP + 1)
        return {"loaded": loaded, "next after load": self._whole(engine.weights()) or {}}

    def _engine(self, optim: OptimSpec) -> Engine:
        run = replace(self.run, optim=optim)
        engine = build_engine(run, run.trained_model(), self.ranks, self.mesh)
        if self.question.fault is not None:
            self.question.fault(engine)
        return engine

    def _step(self, engine: Engine, step: int) -> StepResult:
        rows = self.question.rows
        batches = rows.micro_batches(step, self.mesh.dp_rank, self.mesh.dp_size)
        return engine.train_step(step, batches, rows.num_tokens(batches))

    def _state(self, engine: Engine) -> Tensors:
        return self._whole(engine.weights() | engine.optimizer_state()) or {}

    def _whole(self, pieces: dict) -> Tensors | None:
        return whole(pieces, self.ranks, self.complaints)

    def _checkpoints(self, folder: Path) -> Checkpoints:
        contents = contents_of(self.run, self.ranks)
        return Checkpoints(
            self.run.checkpoint,
            folder,
            ranks=self.ranks,
            lock=RunLock(folder) if self.ranks.placement.is_main else None,
            facts={},
            describe_model=partial(_write_files, contents),
            contents=contents,
        )


def _write_files(contents: Contents, folder: Path) -> None:
    for name, keys in contents.files.items():
        write_json(folder / name, keys)


def _loss(result: StepResult) -> Tensors:
    loss = result.loss_sum / result.num_targets.clamp(min=1)
    sums, counts = result.by_source.cpu().numpy()
    return {
        "targets": np.array(float(result.num_targets)),
        "tokens": np.array(float(result.num_tokens)),
        "loss": np.array(float(loss)),
        "targets by source": counts,
        "loss by source": sums / counts.clip(min=1),
    }


def _norm(result: StepResult) -> Tensors:
    return {"norm": np.array(float(result.grad_norm))}
