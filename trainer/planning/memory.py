"""The most that a rank holds during a step, by what it is, and where in the step that is."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from torch import nn

from trainer.parallel.pieces import local_tensor
from trainer.planning.any_machine import without_float8
from trainer.planning.apart import apart
from trainer.planning.live import BACKWARD, BUILD, FORWARD, GATHERED, Block, Ledger
from trainer.planning.on_gpu import as_on_gpu
from trainer.planning.step import BUFFERS, GRADIENTS, HOST, OPTIMIZER, WEIGHTS, pretend
from trainer.run import Run

COPIES, ACTIVATIONS, LOGITS = "copies of weights", "activations", "logits"
MASKED = ("eager", "sdpa")
"""Back-ends that keep a mask on a GPU."""
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, COPIES, ACTIVATIONS, LOGITS, BUFFERS)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of tensors of the rank that holds most."""

    rank: int
    peak: int
    phase: str
    """Of the step: forward, backward or update."""
    by_category: dict[str, int]
    """What is there at the peak; all of them together are the peak."""
    host: int
    """On top, in the host's memory: what an offloaded optimizer keeps there."""


def memory_of(run: Run, world_size: int, *, is_gpu: bool) -> Memory:
    """Return the memory of a step of full rows: nothing is started, and no weight is there.

    On a GPU attention keeps no mask, and offloaded state lies on the host.
    """
    has_masks = getattr(run.model, "attn_implementation", "auto") in MASKED
    planned = _plannable(run, world_size)
    pp = planned.mesh.axes(world_size)["pp"]
    # The first stage keeps most micro-batches, the last one has the logits.
    ranks = (0, world_size - world_size // pp) if pp > 1 else (0,)
    change = partial(as_on_gpu, has_masks=has_masks) if is_gpu else _as_it_is
    found = [apart(_of_rank, planned, world_size, rank, change, is_gpu=is_gpu) for rank in ranks]
    return max(found, key=lambda memory: memory.peak)


def _plannable(run: Run, world_size: int) -> Run:
    """Return the run as its step can be taken on a CPU, on the mesh that is chosen here."""
    run = without_float8(run)
    engine: Any = run.engine
    if engine.is_compiled:
        engine = replace(engine, compile=False)
    model: Any = run.model
    if getattr(model, "attn_implementation", "sdpa") not in MASKED:
        model = replace(model, attn_implementation="sdpa")  # auto may be flex here
    mesh = run.chosen_mesh(world_size)[0]
    return replace(run, engine=engine, model=model, mesh=mesh)


def _of_rank(
    run: Run, world_size: int, rank: int, change: Callable[[nn.Module], None], *, is_gpu: bool
) -> Memory:
    ledger, parts = pretend(run, world_size, rank, change)
    on_host = [block for block in ledger.blocks if is_gpu and block.kind == HOST]
    here = [block for block in ledger.blocks if not (is_gpu and block.kind == HOST)]
    first = ledger.starts[FORWARD][0]
    peak, at = _peak(here, first)
    alive = [block for block in here if _is_alive(block, at)]
    kind_of = _Kinds(parts)
    sums: Counter[str] = Counter()
    for block in alive:
        sums[kind_of(block)] += block.num_bytes
    sums[OPTIMIZER] += sums[HOST]  # of a CPU
    return Memory(
        rank=rank, peak=peak, phase=_phase_at(ledger, at),
        by_category={name: sums[name] for name in CATEGORIES}, host=_peak(on_host, first)[0],
    )  # fmt: skip


def _as_it_is(_: nn.Module) -> None:
    pass


def _is_alive(block: Block, at: int) -> bool:
    return block.born <= at and (block.died is None or block.died >= at)


def _peak(blocks: list[Block], first: int) -> tuple[int, int]:
    """Return the most bytes at once from operation `first` on, and after which one."""
    held = peak = at = 0
    # What dies behind an operation was still there beside its results.
    for now, change in sorted(_changes(blocks), key=lambda pair: (pair[0], pair[1] < 0)):
        held += change
        if now >= first and held > peak:
            peak, at = held, now
    return peak, at


def _changes(blocks: list[Block]) -> Iterator[tuple[int, int]]:
    for block in blocks:
        yield block.born, block.num_bytes
        if block.died is not None:
            yield block.died, -block.num_bytes


def _phase_at(ledger: Ledger, at: int) -> str:
    """Return the phase of what was made last."""
    return max((b for b in ledger.blocks if b.born <= at), key=lambda block: block.born).phase


class _Kinds:
    """Says what a block holds: by its mark, or by its shape and when it was made."""

    def __init__(self, parts: list[nn.Module]) -> None:
        weights = [p for part in parts for p in part.parameters() if p.ndim > 1]
        self.wide = max((local_tensor(p).element_size() for p in weights), default=4)
        self.shapes = {tuple(p.shape) for p in weights}
        self.vocabularies = {
            len(module.weight) for part in parts if isinstance(module := _head(part), nn.Linear)
        }

    def __call__(self, block: Block) -> str:
        if block.kind == GATHERED:
            return COPIES
        if block.kind:
            return block.kind
        if block.shape in self.shapes:
            size = block.num_bytes // max(1, prod(block.shape))
            is_copy = block.phase == FORWARD and size < self.wide
            return COPIES if is_copy else GRADIENTS
        if len(block.shape) > 1 and block.shape[-1] in self.vocabularies:
            return LOGITS
        if block.phase == BACKWARD and len(block.shape) == 1 and block.num_bytes > 1 << 20:
            return GRADIENTS  # flat, on their way to other ranks
        return BUFFERS if block.phase == BUILD else ACTIVATIONS


def _head(part: nn.Module) -> nn.Module | None:
    name = getattr(part, "head_name", None)
    return part.get_submodule(str(name)) if name else None
