"""Optimizers over the local pieces of the weights, with weight decay by group."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.pieces import Piece, is_vector


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which weights are updated otherwise than the rest.

    Names are whole ones; those that begin with a dot are endings of names.
    """

    no_decay: tuple[str, ...] = ()
    """Whole names or any endings of matrices that weight decay spares."""
    lr_ratios: dict[str, float] = field(default_factory=dict)
    """Learning rates over that of the optimizer."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """In place of that of the optimizer."""
    unfrozen_at: dict[str, int] = field(default_factory=dict)
    """After how many steps a weight began to train, where not at the start."""

    def lr_ratio(self, name: str) -> float:
        """Return the first ratio that fits, else 1."""
        return next((ratio for key, ratio in self.lr_ratios.items() if _is_of(name, key)), 1.0)

    def decays(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether weight decay acts on a weight: by the shape of the *whole* tensor, since a
        shard's own does not say what it is."""
        return not is_vector(shape) and not name.endswith(self.no_decay)

    def weight_decay(self, name: str, piece: Piece, usual: float) -> float:
        found = (decay for key, decay in self.weight_decays.items() if _is_of(name, key))
        return next(found, usual) if self.decays(name, piece.shape) else 0.0


def _is_of(name: str, key: str) -> bool:
    return name == key or (key.startswith(".") and name.endswith(key))


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

    def build(self, *, pieces: dict[str, Piece], rules: Rules) -> torch.optim.Optimizer:
        """Return torch's optimizer over the local parts of `pieces`."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, algorithm 2."""

    lr: float
    """Learning rate where the schedule's factor is 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How much of the running means of gradient and squared gradient a step keeps."""
    eps: float = 1e-8
    """Added to the root of the mean square, against division by nothing."""
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases, gates and embeddings."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: no clipping."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.max_grad_norm)
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(
                    f"optim.betas={list(self.betas)}: set each to 0 or more and below 1"
                )

    def build(self, *, pieces: dict[str, Piece], rules: Rules) -> torch.optim.Optimizer:
        groups = _groups(self, pieces, rules)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Plain gradient descent: its update shows a wrong gradient scale, which Adam's hides."""

    lr: float
    """Learning rate where the schedule's factor is 1."""
    weight_decay: float = 0.0
    """Applied to matrices only: not to norms, biases, gates and embeddings."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this global norm; None: no clipping."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.max_grad_norm)

    def build(self, *, pieces: dict[str, Piece], rules: Rules) -> torch.optim.Optimizer:
        groups = _groups(self, pieces, rules)
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


def _groups(spec: "AdamW | SGD", pieces: dict[str, Piece], rules: Rules) -> list[dict[str, Any]]:
    """Split by how weights are updated."""
    groups: dict[tuple[float, float, int], list[Tensor]] = {}
    for name, piece in pieces.items():
        key = (
            spec.lr * rules.lr_ratio(name),
            rules.weight_decay(name, piece, spec.weight_decay),
            rules.unfrozen_at.get(name, 0),
        )
        groups.setdefault(key, []).append(piece.local)
    return [
        {"params": tensors, "lr": lr, "weight_decay": decay}
        for (lr, decay, _), tensors in sorted(groups.items(), key=lambda item: item[0])
    ]
