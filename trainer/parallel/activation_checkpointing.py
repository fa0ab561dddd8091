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

NONE, FULL, SELECTIVE = "none", "full", "selective"
MODES = (NONE, FULL, SELECTIVE)
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


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing:
    """Which blocks recompute, and how much of them. The numbers do not change."""

    mode: str = NONE
    """none; full: keep a block's input alone; selective: keep results of matmuls and attention."""
    every: int = 1
    """Every n-th block recomputes, from the first on; the others keep all."""

    def __post_init__(self) -> None:
        key = "engine.activation_checkpointing"
        if self.mode not in MODES:
            raise ValueError(
                f"{key}.mode={self.mode!r} is unknown; set it to one of {', '.join(MODES)}"
            )
        if self.every < 1:
            raise ValueError(f"{key}.every={self.every} is not positive; set it to 1 or more")
        if self.mode == NONE and self.every != 1:
            raise ValueError(f"{key}.every={self.every} has no effect; set {key}.mode=full")

    def apply(self, blocks: list[nn.Module]) -> None:
        """Make the blocks recompute, in place; names of modules and weights stay."""
        if self.mode != NONE:
            # Under compile, torch's own default for context_fn must not be given.
            options = {"context_fn": _keeping_matmuls} if self.mode == SELECTIVE else {}
            for block in blocks[:: self.every]:
                block.forward = _recomputing(block, options)


class _Body(nn.Module):
    """The forward of a block's class: the block's own would checkpoint once more."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _recomputing(block: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    body = _Body(block)

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
    is_kept = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_matmuls = partial(create_selective_checkpoint_contexts, _policy)
