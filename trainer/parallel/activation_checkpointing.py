"""Activation checkpointing: blocks that compute their activations again in the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from models.nn.document_attention import OPERATION

NONE, FULL, SELECTIVE, BUDGET = "none", "full", "selective", "budget"
MODES = (NONE, FULL, SELECTIVE, BUDGET)
# What a selective block keeps of one that keeps all, both beyond a full one: 0.44 (Gemma, bf16) to
# 0.62 (GPT-BigCode) were measured. The most: a budget is kept to, though not used up everywhere.
SELECTIVE_SHARE = 0.625
_aten = torch.ops.aten
# What is dear to compute and small to keep. Not bmm: in eager attention its result is (T, S).
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    OPERATION,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
# Of libraries that may not be imported. flash-attn-4 has no operation that torch could see.
_KEPT_NAMES = {"torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"}


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing:
    """Which blocks recompute, and how much of them. The numbers do not change."""

    mode: str = NONE
    """none; full: keep a block's input alone; selective: keep results of matmuls and attention;
    budget: keep a share."""
    every: int = 1
    """Every n-th block recomputes, from the first on; the others keep all."""
    budget: float | None = None
    """With mode=budget: the share of activations that may be kept, from 0 (as full) to below 1 (as
    none). Compiled blocks choose operations, those that are cheap for their bytes; others differ
    from block to block: some selective, the rest none or full."""

    def __post_init__(self) -> None:
        key = "engine.activation_checkpointing"
        if self.mode not in MODES:
            raise ValueError(
                f"{key}.mode={self.mode!r} is unknown; set it to one of {', '.join(MODES)}"
            )
        if self.every < 1:
            raise ValueError(f"{key}.every={self.every} is not positive; set it to 1 or more")
        if self.mode in (NONE, BUDGET) and self.every != 1:
            raise ValueError(f"{key}.every={self.every} has no effect; set {key}.mode=full")
        if self.mode != BUDGET and self.budget is not None:
            raise ValueError(f"{key}.budget={self.budget} has no effect; set {key}.mode={BUDGET}")
        if self.mode == BUDGET and (self.budget is None or not 0 <= self.budget < 1):
            raise ValueError(
                f"{key}.mode={BUDGET} needs the share of activations that may be kept, found "
                f"{key}.budget={self.budget}; set it to 0 or more and below 1, as 0.5"
            )

    def check(self, *, is_compiled: bool) -> None:
        """Raise ValueError for a budget that this release of torch cannot keep to."""
        is_known = hasattr(torch.autograd.graph, "region_activation_memory_budget")
        if self.budget is not None and is_compiled and not is_known:
            raise ValueError(
                f"engine.activation_checkpointing.mode={BUDGET} with engine.compile=true needs "
                f"torch 2.13, found {torch.__version__}; set the mode to {SELECTIVE} or {FULL}"
            )

    def apply(self, blocks: list[nn.Module], *, is_compiled: bool = False) -> None:
        """Make the blocks recompute, in place; names of modules and weights stay."""
        if is_compiled and self.budget is not None:
            from torch._functorch import config

            config.is_non_builtin_to_include = True  # else attention, of our own, counts as free
        for block, mode in zip(blocks, self.modes(len(blocks)), strict=True):
            if is_compiled and self.budget is not None:
                block.forward = _within(block, self.budget)
            elif mode != NONE:
                block.forward = _recomputing(block, mode)

    def modes(self, num_blocks: int) -> list[str]:
        """Return how each of so many blocks recomputes that are not compiled.

        A budget buys results of matmuls first, whose bytes save most time; what is left of it, or
        what is missing, is spread evenly over the blocks.
        """
        if self.budget is None:
            return [NONE if n % self.every else self.mode for n in range(num_blocks)]
        if self.budget < SELECTIVE_SHARE:
            more, less, share = SELECTIVE, FULL, self.budget / SELECTIVE_SHARE
        else:
            more, less = NONE, SELECTIVE
            share = (self.budget - SELECTIVE_SHARE) / (1 - SELECTIVE_SHARE)
        kept = int(num_blocks * share + 1e-9)
        return [
            more if (n + 1) * kept // num_blocks > n * kept // num_blocks else less
            for n in range(num_blocks)
        ]


class _Body(nn.Module):
    """The forward of a block's class: the block's own would checkpoint once more."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _within(block: nn.Module, budget: float) -> Callable[..., Any]:
    """Let torch's partitioner solve a knapsack: the least FLOPs again, for so many bytes kept."""
    body, fallback = _Body(block), _recomputing(block, FULL)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # torch gave up on a graph: less memory, not more
            return fallback(*args, **kwargs)
        with torch.autograd.graph.region_activation_memory_budget(budget):
            return body(*args, **kwargs)

    return forward


def _recomputing(block: nn.Module, mode: str) -> Callable[..., Any]:
    body = _Body(block)
    # Under compile, torch's own default for context_fn must not be given.
    options: dict[str, Any] = {"context_fn": _keeping_matmuls} if mode == SELECTIVE else {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = body
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        weights: dict[str, torch.Tensor] = dict(body.named_parameters())
        if not all(isinstance(weight, nn.Parameter) for weight in weights.values()):
            # ComputeCast lends cast weights for the forward pass only: the second one needs them.
            def run(*args: Any, **kwargs: Any) -> Any:
                return functional_call(body, weights, args, kwargs)

        return checkpoint(run, *args, use_reentrant=False, **options, **kwargs)

    return forward


def _policy(_context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = operator in _KEPT or operator.name() in _KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_matmuls = partial(create_selective_checkpoint_contexts, _policy)
