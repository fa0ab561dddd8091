"""A step of one rank as the engine really takes it, on tensors without memory."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.optimizers.lean_adamw import CHUNKS
from trainer.parallel.pieces import is_dtensor, local_tensor
from trainer.planning.live import FORWARD, UPDATE, Ledger
from trainer.planning.pretend import Pretend
from trainer.planning.rows import full_batches, with_images
from trainer.preview import lay_out
from trainer.run import Run

WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS = "weights", "gradients", "optimizer", "buffers"
HOST = "host"
"""Holds what an offloaded optimizer keeps in the host's memory."""


def pretend(
    run: Run, world_size: int, rank: int, change: Callable[[nn.Module], None]
) -> tuple[Ledger, list[nn.Module]]:
    """Return what `rank` of `world_size` would hold, and its parts of the model.

    `change` is done to the planned model before it is laid out. Of several phases the last one is
    taken, which as a rule trains most.
    """
    laid_out, mesh = lay_out(run, world_size, rank, step=run.freeze.last_phase, change=change)
    try:
        batches = full_batches(run, mesh.dp_size, is_pipeline=mesh.size("pp") > 1)
        ledger = Ledger()
        mode, device = Pretend(ledger), torch.device("cpu")
        around = run.surroundings(laid_out.parts[0], mesh, device)
        with ledger.watching_sizes(), _staying(), warnings.catch_warnings(), mode:
            # DeepSpeed looks at addresses, to see that they are aligned: there are none.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            laid_out.fill(device, lambda _, start, stop: torch.empty(stop - start))
            batches = [with_images(batch, run) for batch in batches]
            for part in laid_out.parts:
                _mark_parts(part, ledger)
            engine: Any = run.engine.build(laid_out, around)
            _mark_engine(engine, ledger, HOST if run.engine.offload_optimizer else OPTIMIZER)
            _update_as_on_gpu(engine)
            num_tokens = sum(batch.input_ids.numel() for batch in batches)
            for step in range(1, _num_steps(engine) + 1):
                ledger.enter(FORWARD)
                engine.train_step(step, batches, num_tokens)
        return ledger, laid_out.parts
    finally:
        dist.destroy_process_group()


def _num_steps(engine: Any) -> int:
    """Return 1 where a step leaves nothing behind but what it began with; else 2.

    DDP and DeepSpeed make buckets, pipelines and offloaded optimizers buffers, in the first one.
    """
    leaves = any(isinstance(called, DistributedDataParallel) for called in engine.passes.called)
    update = getattr(engine, "update", None)
    is_plain = update is not None and update.host is None and len(engine.passes.called) == 1
    return 1 if is_plain and not leaves and not hasattr(engine.passes, "schedule") else 2


def _update_as_on_gpu(engine: Any) -> None:
    """Let an optimizer of ours take as many elements at a time as a GPU gets: a CPU's few would be
    a million operations to write down."""
    update = getattr(engine, "update", None)
    if update is not None and hasattr(update.optimizer, "chunk"):
        update.optimizer.chunk = CHUNKS["cuda"]


@contextmanager
def _staying() -> Iterator[None]:
    """Let modules stay where they are: tensors without memory cannot move."""
    plain: Any = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_move = len(args) == 1 and isinstance(args[0], torch.device | str | int) and not kwargs
        return module if is_move else plain(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = plain  # type: ignore[method-assign]


def _mark_parts(part: nn.Module, ledger: Ledger) -> None:
    kinds = ((WEIGHTS, part.parameters()), (BUFFERS, part.buffers()))
    for kind, tensors in kinds:
        for tensor in tensors:
            ledger.note(local_tensor(tensor))
            ledger.mark(local_tensor(tensor), kind)


def _mark_engine(engine: Any, ledger: Ledger, kept: str) -> None:
    """Say that the optimizer's tensors are `kept`, and let gradients be marked once they are there.

    DeepSpeed's optimizer has flat weights of its own.
    """
    for called in engine.passes.called:
        if isinstance(called, DistributedDataParallel):
            called.register_comm_hook(None, _at_once)
    update = getattr(engine, "update", None)
    if update is None:
        base, weights = engine.state.base, list(engine.engine.module.parameters())
        _mark(ledger, [getattr(weight, "ds_tensor", weight) for weight in weights], WEIGHTS)
        groups = [weight for group in base.param_groups for weight in group["params"]]
        own = set(map(id, weights))
        _mark(ledger, [weight for weight in groups if id(weight) not in own], kept)
        _mark(ledger, [v for state in base.state.values() for v in state.values()], kept)
        return
    _mark(ledger, [piece.local for piece in engine.optimizer_state().values()], kept)
    if update.host:
        _mark(ledger, [piece.local for piece in update.host.pieces.values()], HOST)
    _mark_gradients(update, ledger)


def _mark(ledger: Ledger, tensors: list[Any], kind: str) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not is_dtensor(tensor):
            ledger.mark(tensor, kind)


def _at_once(
    _: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch looks at the annotation
) -> torch.futures.Future[Tensor]:
    """Let DDP go on with its own gradients: a message to nobody has no result."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _mark_gradients(update: Any, ledger: Ledger) -> None:
    """Note where the update begins, and which gradients it finds."""
    norm, give = update.grad_norm, update._given

    def grad_norm(gradients: dict[str, Tensor]) -> Tensor:
        ledger.enter(UPDATE)
        _mark(ledger, list(gradients.values()), GRADIENTS)
        return cast(Tensor, norm(gradients))

    def given(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = give(gradients)
        if update.host:
            _mark(ledger, list(update.host.buffers.values()), HOST)
        return found

    update.grad_norm, update._given = grad_norm, given
