"""Out of memory: one line with what was held, for which shapes, and what makes it less."""

import os
import re
from typing import Any

import torch

from trainer.distributed import Ranks
from trainer.errors import MemoryExhaustedError
from trainer.meter import peak_memory_gib
from trainer.parallel.activation_checkpointing import NONE
from trainer.parallel.fully_sharded import FORWARD, MICRO_BATCH, STEP, FullySharded
from trainer.run import Run

# What torch's allocators of the host and of NCCL say, in plain RuntimeErrors.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)")


def in_words(
    error: Exception, run: Run, ranks: Ranks, place: dict[str, Any]
) -> MemoryExhaustedError | None:
    """Return an error that says it; None where another thing went wrong.

    `place`: the step and phase of this rank.
    """
    is_torchs = isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in _SIGNS
    )
    if not is_torchs and not isinstance(error, MemoryError):
        return None
    tried = _TRIED.search(str(error))
    needed = f", {tried[1]} more were needed" if tried else ""
    when = f"step {place['step']}, {place['phase']}" if place["step"] else str(place["phase"])
    return MemoryExhaustedError(
        f"out of memory on {ranks.device} ({when}): {peak_memory_gib(ranks.device):.2f} of "
        f"{_total_gib(ranks.device):.2f} GiB held at most{needed}, with {_shapes(run)} in "
        f"precision={run.precision}; {_advice(run, ranks.placement.world_size)}"
    )


def _total_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _shapes(run: Run) -> str:
    rows = run.data.micro_rows
    return f"micro-batches of {rows or 'all of a rank'} rows x {run.data.row_tokens} tokens"


def _advice(run: Run, world_size: int) -> str:
    """Say what the run does not do yet, the cheapest first; the first two change no number."""
    rows = run.data.micro_rows
    found = []
    if rows is None:
        found.append("set data.micro_rows=1 or a little more")
    elif rows > 1:
        found.append(f"lower data.micro_rows from {rows} to {max(1, rows // 2)}")
    key, recompute = "engine.activation_checkpointing", run.engine.activation_checkpointing
    if recompute.mode == NONE:
        found.append(f"set {key}.mode=budget with {key}.budget=0.5, or {key}.mode=full")
    elif recompute.budget:
        found.append(f"lower {key}.budget from {recompute.budget:g} to {recompute.budget / 2:g}")
    fsdp = getattr(run.engine, "fsdp", FullySharded())
    if fsdp.reshard_after != FORWARD:
        found.append(f"set engine.fsdp.reshard_after={FORWARD}")
    axes = run.chosen_mesh(world_size)[0].axes(world_size)
    if axes["dp_replicate"] > 1 and run.engine.can_shard:
        found.append("set mesh=fsdp, which shares weights and optimizer out over the ranks")
    is_sharded = axes["dp_shard"] > 1 and axes["pp"] == 1
    passes = run.data.micro_batches(axes["dp_replicate"] * axes["dp_shard"])
    if is_sharded and fsdp.gradient_sync == STEP and passes != 1:
        found.append(f"set engine.fsdp.gradient_sync={MICRO_BATCH}, which keeps no whole gradient")
    if not found:
        found.append("start more processes, or lower data.row_tokens")
    return "; or ".join(found)
