"""Optimizers over the local pieces of the weights, with weight decay by group."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.pieces import Piece


class OptimSpec(Protocol):
    """An optimizer and its clipping."""

    @property
    def lr(self) -> float:
        """Learning rate at schedule factor 1."""
        ...

    @property
    def max_grad_norm(self) -> float | None:
        """Gradients are scaled down to this global norm; None: no clipping."""
        ...

    def build(
        self, *, pieces: dict[str, Piece], no_decay: tuple[str, ...], lr_ratios: dict[str, float]
    ) -> torch.optim.Optimizer:
        """`no_decay`: endings of names that weight decay spares. `lr_ratios`: learning rates over
        `lr`, by ending of names."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, algorithm 2."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases and embeddings."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: no clipping."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.max_grad_norm)
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(
                    f"optim.betas={list(self.betas)}: set each to 0 or more and below 1"
                )

    def build(
        self, *, pieces: dict[str, Piece], no_decay: tuple[str, ...], lr_ratios: dict[str, float]
    ) -> torch.optim.Optimizer:
        groups = _groups(self, pieces, no_decay, lr_ratios)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Plain gradient descent: its update shows a wrong gradient scale, which Adam's hides."""

    lr: float
    weight_decay: float = 0.0
    """Applied to matrices only: not to norms, biases and embeddings."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this global norm; None: no clipping."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.max_grad_norm)

    def build(
        self, *, pieces: dict[str, Piece], no_decay: tuple[str, ...], lr_ratios: dict[str, float]
    ) -> torch.optim.Optimizer:
        groups = _groups(self, pieces, no_decay, lr_ratios)
        return torch.optim.SGD(groups, lr=self.lr, fused=True)


def _check(lr: float, weight_decay: float, max_grad_norm: float | None) -> None:
    if not 0.0 < lr < math.inf:  # NaN too
        raise ValueError(f"optim.lr={lr} is not positive; set it above 0")
    if weight_decay < 0.0:
        raise ValueError(f"optim.weight_decay={weight_decay} is negative; set it to 0 or more")
    if max_grad_norm is not None and max_grad_norm <= 0.0:
        raise ValueError(
            f"optim.max_grad_norm={max_grad_norm} is not positive; "
            "set it above 0, or to null for off"
        )


def _groups(
    spec: "AdamW | SGD",
    pieces: dict[str, Piece],
    no_decay: tuple[str, ...],
    lr_ratios: dict[str, float],
) -> list[dict[str, Any]]:
    """Split by the shape of the *whole* tensor: a shard's own shape does not say what it is."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, piece in pieces.items():
        ratio = next((r for end, r in lr_ratios.items() if name.endswith(end)), 1.0)
        is_plain = len(piece.shape) < 2 or name.endswith(no_decay)
        groups.setdefault((ratio, is_plain), []).append(piece.local)
    return [
        {"params": tensors, "lr": spec.lr * ratio, "weight_decay": spec.weight_decay * (not plain)}
        for (ratio, plain), tensors in sorted(groups.items(), key=lambda item: item[0])
    ]
