"""Faults on purpose: a verification that cannot fail shows nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.batch import Batch
from trainer.engines.native_trainer import NativeTrainer
from trainer.engines.update import Update
from trainer.parallel import collectives
from trainer.parallel.fully_sharded import is_fsdp
from trainer.protocols import Engine, StepResult


def dropped_all_reduce(engine: Engine) -> None:
    """Every rank keeps its own gradients where they should be summed over ranks."""
    assert isinstance(engine, NativeTrainer)
    collectives._all_reduce = lambda x, group: x
    collectives._reduce_scatter = _own_part
    engine.update.sum_shared = lambda gradients: None  # type: ignore[method-assign]
    for part in engine.passes.called:
        if isinstance(part, DistributedDataParallel):
            part.register_comm_hook(None, _keep_bucket)
        elif is_fsdp(part):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _own_part(x: Tensor, group: Any) -> Tensor:
    return x.chunk(group.size(), collectives.TOKENS)[group.rank()].contiguous()


def _keep_bucket(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def doubled_gradient(engine: Engine) -> None:
    """The gradient of the first weight that trains counts twice."""
    assert isinstance(engine, NativeTrainer)
    update: Update = engine.update
    compute = update.grad_norm

    def grad_norm(gradients: dict[str, Tensor]) -> Tensor:
        first = next(name for name in update.pieces if name in update.trained)
        if first in gradients:
            gradients[first].mul_(2.0)
        return compute(gradients)

    update.grad_norm = grad_norm  # type: ignore[method-assign]


def shifted_label(engine: Engine) -> None:
    """Every label stands one place too late."""
    step_of: Any = engine.train_step

    def train_step(step: int, batches: list[Batch], num_tokens: int) -> StepResult:
        shifted = [replace(batch, labels=batch.labels.roll(1, dims=1)) for batch in batches]
        result: StepResult = step_of(step, shifted, num_tokens)
        return result

    setattr(engine, "train_step", train_step)  # noqa: B010  a method of an unknown class


FAULTS: dict[str, Callable[[Engine], None]] = {
    "dropped_all_reduce": dropped_all_reduce,
    "doubled_gradient": doubled_gradient,
    "shifted_label": shifted_label,
}
