"""AdamW whose state may be bf16 or 8 bits, and that rounds bf16 weights by chance."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.optimizers.eight_bit import is_coded, num_blocks
from trainer.optimizers.moments import CodedMoment, Moment, PlainMoment, as_rows, write
from trainer.optimizers.rounding import Noise
from trainer.pieces import Piece

WEIGHTS, BF16, EIGHT_BIT = "weights", "bf16", "8bit"
STATES = (WEIGHTS, BF16, EIGHT_BIT)
CHUNKS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are computed at a time: what stays in a core's cache; 64 MiB, that few kernels do
the work and what they leave for each other is small beside the weights."""


class _Kept(NamedTuple):
    """One weight and what is kept for it."""

    piece: Piece
    step: Tensor
    """Updates so far, 0-dim, on the device."""
    mean: Moment
    square: Moment
    noise: Noise | None
    """Of what is kept in bf16."""


class LeanAdamW:
    """AdamW over pieces, in at least fp32. Source: Loshchilov and Hutter 2019, algorithm 2.

    Each operation rounds once, so that an element's bits do not depend on where it lies.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        pieces: dict[str, Piece],
        *,
        betas: tuple[float, float],
        eps: float,
        states: str,
        seed: int,
    ) -> None:
        """`groups` are torch's: params, lr and weight_decay."""
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.found_inf: Tensor | None = None
        """1.0 where nothing may change: no host sync."""
        self.chunk: int | None = None
        """Elements at a time; None: as the device has it."""
        self._kept = {
            piece.local: _keep(piece, name, states, seed) for name, piece in pieces.items()
        }
        self.state = {
            weight: {
                "step": kept.step, **kept.mean.tensors("exp_avg"),
                **kept.square.tensors("exp_avg_sq"),
            }
            for weight, kept in self._kept.items()
        }  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.numel():
                    self._update(weight, group["lr"], group["weight_decay"])

    def _update(self, weight: Tensor, lr: float, decay: float) -> None:
        kept = self._kept[weight]
        skip = None if self.found_inf is None else self.found_inf.bool()
        wide = torch.promote_types(weight.dtype, torch.float32)
        kept.step.add_(1.0 if self.found_inf is None else 1.0 - self.found_inf)
        # A first step that is skipped: its numbers are not kept, and need not be numbers.
        step = kept.step.double()
        corrections = [(1 - torch.pow(beta, step)).to(wide) for beta in self.betas]
        assert weight.grad is not None
        weights, gradients = (as_rows(t, kept.piece) for t in (weight, weight.grad.contiguous()))
        for first, last in self._chunks(weights):
            bits = kept.noise.bits(kept.step, first, last) if kept.noise else None
            gradient = gradients[first:last].to(wide)
            mean, square = self._means(kept, gradient, first, last)
            change = mean.div(square.sqrt().div_(corrections[1].sqrt()).add_(self.eps))
            new = weights[first:last].to(wide, copy=True).mul_(1 - lr * decay)
            new.sub_(change.mul_(lr / corrections[0]))
            write(weights[first:last], new, bits, 0, skip)
            kept.mean.write(first, last, mean, bits=bits, skip=skip)
            kept.square.write(first, last, square, bits=bits, skip=skip)

    def _means(self, kept: _Kept, gradient: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the new running means of gradient and squared gradient."""
        mean = kept.mean.read(first, last, gradient.dtype).mul_(self.betas[0])
        square = kept.square.read(first, last, gradient.dtype).mul_(self.betas[1])
        mean.add_(gradient * (1 - self.betas[0]))
        square.add_(gradient.square().mul_(1 - self.betas[1]))
        return mean, square

    def _chunks(self, rows: Tensor) -> Iterator[tuple[int, int]]:
        at_a_time = self.chunk or CHUNKS.get(rows.device.type, CHUNKS["cuda"])
        count = max(1, at_a_time // max(1, rows.shape[1]))
        for first in range(0, len(rows), count):
            yield first, min(first + count, len(rows))


def _keep(piece: Piece, name: str, states: str, seed: int) -> _Kept:
    own = piece.local.dtype
    dtype = torch.bfloat16 if states == BF16 else own
    mean: Moment = PlainMoment(piece, dtype, use=1)
    square: Moment = PlainMoment(piece, dtype, use=2)
    if states == EIGHT_BIT and is_coded(piece.shape):
        mean, square = (CodedMoment(piece, is_signed=is_signed) for is_signed in (True, False))
    noise = Noise(piece, name, seed) if torch.bfloat16 in (own, dtype) else None
    step = torch.zeros((), dtype=torch.float32, device=piece.local.device)
    return _Kept(piece, step, mean, square, noise)


def bytes_per_element(shape: tuple[int, ...], dtype: torch.dtype, states: str) -> float:
    """Return what is kept for each element of a whole weight of this shape."""
    if states == EIGHT_BIT and is_coded(shape):
        width = torch.Size(shape[1:]).numel()
        return 2 * (1 + 4 * num_blocks(width) / width)
    return 2.0 * (torch.bfloat16 if states == BF16 else dtype).itemsize
