"""Two steps of one rank as the engine really takes them, on tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.parallel.pieces import local_tensor
from trainer.planning.live import FORWARD, UPDATE, Ledger
from trainer.planning.pretend import Pretend
from trainer.planning.rows import full_batches, with_images
from trainer.preview import lay_out
from trainer.run import Run

WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS = "weights", "gradients", "optimizer", "buffers"
STEPS = 2  # DDP makes its buckets anew after the first one


def pretend(run: Run, world_size: int, rank: int) -> tuple[Ledger, list[nn.Module]]:
    """Return what `rank` of `world_size` would hold over two steps, and its parts of the model."""
    laid_out, mesh = lay_out(run, world_size, rank)
    batches = full_batches(run, mesh.dp_size, is_pipeline=mesh.size("pp") > 1)
    ledger = Ledger()
    mode = Pretend(ledger)
    try:
        with ledger.watching_sizes(), _staying(), mode:
            device = torch.device("cpu")
            with mode.shapes:
                laid_out.fill(device, lambda _, start, stop: torch.empty(stop - start))
            model = laid_out.parts[0]
            around = run.surroundings(model, mesh, device)
            for part in laid_out.parts:
                _mark_weights(part, ledger)
            engine: Any = run.engine.build(laid_out, around)
            for called in engine.passes.called:
                _answer_at_once(called)
            if hasattr(engine, "update"):
                for value in engine.optimizer_state().values():
                    ledger.mark(value.local, OPTIMIZER)
                _mark_gradients(engine.update, ledger)
            with mode.shapes:
                batches = [with_images(batch, run) for batch in batches]
            for step in range(1, STEPS + 1):
                ledger.enter(FORWARD)
                engine.train_step(step, batches, sum(batch.input_ids.numel() for batch in batches))
        return ledger, laid_out.parts
    finally:
        dist.destroy_process_group()


@contextmanager
def _staying() -> Iterator[None]:
    """Let modules stay where they are: tensors without memory cannot move."""
    plain = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_move = len(args) == 1 and isinstance(args[0], torch.device | str | int) and not kwargs
        return module if is_move else plain(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = plain  # type: ignore[method-assign]


def _answer_at_once(called: nn.Module) -> None:
    """Let DDP go on with its own gradients: messages to nobody have no result."""

    def hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    if isinstance(called, DistributedDataParallel):
        called.register_comm_hook(None, hook)


def _mark_weights(part: nn.Module, ledger: Ledger) -> None:
    for parameter in part.parameters():
        ledger.note(local_tensor(parameter))
        ledger.mark(local_tensor(parameter), WEIGHTS)
    for buffer in part.buffers():
        ledger.note(buffer)
        ledger.mark(buffer, BUFFERS)


def _mark_gradients(update: Any, ledger: Ledger) -> None:
    """Note where the update begins, and which gradients it finds."""
    norm = update.grad_norm

    def grad_norm() -> Tensor:
        ledger.enter(UPDATE)
        for parameter in update.parameters.values():
            if parameter.grad is not None:
                ledger.mark(local_tensor(parameter.grad), GRADIENTS)
        return cast(Tensor, norm())

    update.grad_norm = grad_norm
