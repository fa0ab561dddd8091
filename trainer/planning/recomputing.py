"""The least recomputation with which a run fits a device: the largest budget of activations."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from trainer.parallel.activation_checkpointing import (
    BUDGET,
    FULL,
    NONE,
    SELECTIVE,
    SELECTIVE_SHARE,
    ActivationCheckpointing,
)
from trainer.planning.memory import Memory, memory_of
from trainer.run import Run

STEPS = 20  # of a budget: 0.05 each


@dataclass(frozen=True, kw_only=True)
class Recomputing:
    """What would be held with less kept."""

    budget: float | None
    """Of `engine.activation_checkpointing`; None: all would not be enough."""
    memory: Memory
    """With that budget; without one, with all blocks computed again."""


def least_recomputing(
    run: Run, processes: int, held: Memory, has_bytes: float, *, is_gpu: bool
) -> Recomputing | None:
    """Return what lets a run that holds too much fit; None where it already recomputes all.

    Budgets are planned, not reckoned: a line through both ends is where the search begins.
    """
    now: ActivationCheckpointing = run.engine.activation_checkpointing
    shares = {NONE: 1.0, SELECTIVE: SELECTIVE_SHARE, BUDGET: now.budget, FULL: None}
    share = shares[now.mode] if now.every == 1 else 1.0
    if not share:
        return None

    @cache  # seconds each, and the search comes by some of them twice
    def planned(step: int) -> Memory:
        recompute = ActivationCheckpointing(mode=BUDGET, budget=step / STEPS)
        engine: Any = replace(run.engine, activation_checkpointing=recompute)  # type: ignore[type-var]
        return memory_of(replace(run, engine=engine), processes, is_gpu=is_gpu)

    if (least := planned(0).peak) > has_bytes:
        return Recomputing(budget=None, memory=planned(0))
    part = (has_bytes - least) / max(1, held.peak - least)
    step = min(STEPS - 1, int(STEPS * share * part))
    while planned(step).peak > has_bytes:
        step -= 1
    # The peak of a step is a maximum, so the line lies above it: more may be kept.
    while step + 1 < STEPS and planned(step + 1).peak <= has_bytes:
        step += 1
    return Recomputing(budget=step / STEPS, memory=planned(step))
