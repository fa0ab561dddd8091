"""What a rank of a large mesh would hold, found in one process without memory or messages."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from trainer.mesh import Mesh
from trainer.parallel.laid_out import LaidOut
from trainer.run import Run


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Parameters of one kind: the same name but for numbers, the same shapes."""

    name: str
    """With `*` for numbers."""
    count: int
    whole: tuple[int, ...]
    local: tuple[int, ...]
    dtype: torch.dtype


def lay_out(
    run: Run,
    world_size: int,
    rank: int,
    *,
    step: int = 1,
    change: Callable[[nn.Module], None] | None = None,
) -> tuple[LaidOut, Mesh]:
    """Lay the meta model out as `rank` of `world_size` would, over a process group that is none.

    `step` says what trains; `change` is done to the model before. The caller destroys the process
    group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    mesh = Mesh("cpu", run.chosen_mesh(world_size)[0].axes(world_size))
    model = run.trained_model(step)
    if change is not None:
        change(model)
    return run.engine.lay_out(model, run.surroundings(model, mesh, torch.device("cpu"))), mesh


def shards(run: Run, world_size: int, rank: int = 0) -> list[Shard]:
    """Return what `rank` would hold, in the order of the model; nothing of other stages."""
    laid_out, _ = lay_out(run, world_size, rank)
    found: dict[tuple[object, ...], int] = {}
    here = laid_out.parameters()
    for name, piece in laid_out.pieces().items():
        if name in here:
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            key = (kind, piece.shape, tuple(piece.local.shape), piece.local.dtype)
            found[key] = found.get(key, 0) + 1
    dist.destroy_process_group()
    return [
        Shard(name=str(kind), count=count, whole=whole, local=local, dtype=dtype)  # type: ignore[arg-type]
        for (kind, whole, local, dtype), count in found.items()
    ]
