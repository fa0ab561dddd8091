"""The same bits again: what `deterministic` refuses, what it sets, and what must stay as it was.

`run`: the same layout gives the same bits, across kills and resumes. `topology_free`: other numbers
of ranks do, too; what that needs of an engine stands in trainer/engines/topology_free.py.
"""

import logging
from typing import Any

import torch

from trainer.distributed import Ranks
from trainer.drift import ALLOW_BITS
from trainer.engines.topology_free import NUM_THREADS
from trainer.mesh import Mesh
from trainer.settings import OFF, RUN, TOPOLOGY_FREE, Settings

log = logging.getLogger(__name__)
_OF_THE_LAYOUT = ("mesh", "ranks", "threads")
"""What topology_free does not depend on: it computes with one thread."""


def check_repeatable(settings: Settings, axes: dict[str, int]) -> None:
    """Raise ValueError for what cannot give the same bits twice."""
    if axes["pp"] > 1 and axes["dp_shard"] == 1 and axes["dp_replicate"] * axes["cp"] > 1:
        raise ValueError(
            "deterministic=run: copies of pipelines add up gradients otherwise in the first step "
            "after each start; set mesh.dp_replicate=1 and mesh.cp=1 or mesh.pp=1, or "
            "deterministic=off"
        )
    if not settings.engine.owns_sums:
        raise ValueError(
            "deterministic=run needs sums over ranks in one order, and this engine adds otherwise "
            "in the first step after each start; set engine=native, or deterministic=off"
        )


def fix_bits(settings: Settings) -> None:
    """Tell torch to compute the same each time, before it computes anything."""
    if settings.deterministic == TOPOLOGY_FREE:
        torch.set_num_threads(NUM_THREADS)
    if settings.deterministic == RUN:
        # An operation without a deterministic way raises an error that names it.
        torch.use_deterministic_algorithms(True)
        # Nor would torch fill what is not written yet, a kernel for each tensor: nothing reads it.
        # It fills with NaN, and steps under it gave the finite bits that they give without.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        if settings.engine.is_compiled:
            from torch._inductor import config

            config.deterministic = True  # no choice between kernels by a stopwatch


def bits_of(ranks: Ranks, mesh: Mesh) -> dict[str, Any]:
    """Return what decides the bits of a run beside its config: a checkpoint keeps it."""
    is_cuda = ranks.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "nccl": str(torch.cuda.nccl.version()) if is_cuda else None,
        "device": torch.cuda.get_device_name(ranks.device) if is_cuda else "cpu",
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.placement.world_size,
        "mesh": mesh.describe(),
    }


def check_bits(
    settings: Settings, step: int, was: dict[str, Any] | None, now: dict[str, Any]
) -> None:
    """Raise ValueError where a resumed run would give other bits than the one it goes on with.

    Checkpoints of version 0.1 say nothing of it.
    """
    mode = settings.deterministic
    if mode == OFF or was is None:
        return
    for name, value in now.items():
        before = was.get(name)
        if before == value or (mode == TOPOLOGY_FREE and name in _OF_THE_LAYOUT):
            continue
        change = f"{name} was {before} when step {step} was saved and is {value} now"
        if ALLOW_BITS not in settings.resume_allow:
            raise ValueError(
                f"deterministic={mode}: {change}, which gives other bits; start as it was then, or "
                f"go on with other bits: resume_allow=[{ALLOW_BITS}]"
            )
        log.warning("deterministic=%s: %s: other bits from here on", mode, change)
