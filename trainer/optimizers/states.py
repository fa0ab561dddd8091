"""The state of an optimizer: made before the first step, and where each part of it lies."""

from typing import Any, cast

import torch
from torch import Tensor

from trainer.optimizers.eight_bit import scale_piece
from trainer.pieces import Piece


def make_state(optimizer: Any) -> None:
    """Make the state of every weight; ours have it from the beginning.

    torch's make it at the first update, so here is one that changes nothing.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    weights: list[Tensor] = [w for group in optimizer.param_groups for w in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
        cast(Any, optimizer).found_inf = torch.ones((), device=weight.device)
    optimizer.step()
    for weight in weights:
        weight.grad = None


def state_piece(piece: Piece, value: Tensor, *, is_own: bool) -> Piece:
    """Return where a part of a weight's state lies: as the weight, or one number for each block.

    Scalars, as counts of updates, are the same on every rank; `is_own`: whether this one writes
    them.
    """
    if value.shape == piece.local.shape:
        return piece.like(value)
    return scale_piece(piece, value) if value.ndim else Piece.of(value, is_own=is_own)
