"""Optimizers over the local pieces of the weights, with weight decay by group."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trainer.optimizers.eight_bit import check_blocks
from trainer.optimizers.lean_adamw import (
    EIGHT_BIT,
    STATES,
    WEIGHTS,
    LeanAdamW,
    bytes_per_element,
)
from trainer.optimizers.place import ALONE, Place, Work
from trainer.optimizers.rules import Rules, groups_of
from trainer.pieces import Piece

ROUNDINGS = STOCHASTIC, NEAREST = "stochastic", "nearest"


class Optimizer(Protocol):
    """What updates the weights: torch's, or one of `trainer.optimizers`."""

    param_groups: list[dict[str, Any]]
    """Each with `params`, `lr` and `weight_decay`."""
    state: Any
    """Tensors by kind, for each weight."""

    def step(self) -> Any:
        """Update what has a gradient; an attribute `found_inf` that is 1.0 leaves all as it is."""
        ...


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

    def check(self, work: Work) -> None:
        """Raise ValueError for what cannot work."""
        ...

    def state_bytes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rules: Rules
    ) -> int:
        """Return what is kept for a whole weight."""
        ...

    def build(self, *, pieces: dict[str, Piece], rules: Rules, place: Place = ALONE) -> Optimizer:
        """Return the optimizer over the local parts of `pieces`."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """What every AdamW can be told."""

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
    states: str = WEIGHTS
    """How the running means are kept: `weights` (in the dtype of the weights), `bf16`, or `8bit`
    (blocks of 256 with a scale; norms and biases in the dtype of the weights)."""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.weight_decay, self.max_grad_norm)
        check_betas("optim.betas", self.betas)
        _check_known("optim.states", self.states, STATES)


@dataclass(frozen=True, kw_only=True)
class AdamW(AdamSettings):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, algorithm 2."""

    rounding: str = STOCHASTIC
    """How weights and means that are kept in bf16 are rounded: `stochastic` or `nearest`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_known("optim.rounding", self.rounding, ROUNDINGS)
        if self.rounding == NEAREST and self.states != WEIGHTS:
            raise ValueError(
                f"optim.rounding={NEAREST} has no effect with optim.states={self.states}, which is "
                "computed with stochastic rounding; set optim.rounding=stochastic"
            )

    def check(self, work: Work) -> None:
        if self.rounding == NEAREST and not any(
            p.requires_grad and p.dtype == torch.bfloat16 for p in work.model.parameters()
        ):
            raise ValueError(
                "optim.rounding=nearest has no effect where no weight that trains is bf16; set it "
                "to stochastic, or precision=pure_bf16"
            )
        if self.states == WEIGHTS:
            return
        if not work.owns_update:
            raise ValueError(
                f"optim.states={self.states}: DeepSpeed keeps its optimizer's state itself; set "
                f"optim=adamw, or use engine=native"
            )
        if self.states == EIGHT_BIT:
            check_blocks(work.model, work.layout, work.axes["tp"])

    def state_bytes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rules: Rules
    ) -> int:
        return round(math.prod(shape) * bytes_per_element(shape, dtype, self.states))

    def build(self, *, pieces: dict[str, Piece], rules: Rules, place: Place = ALONE) -> Optimizer:
        groups = groups_of(self.lr, self.weight_decay, pieces, rules)
        is_narrow = any(piece.local.dtype == torch.bfloat16 for piece in pieces.values())
        if self.states == WEIGHTS and not (is_narrow and self.rounding == STOCHASTIC):
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return LeanAdamW(
            groups, pieces, betas=self.betas, eps=self.eps, states=self.states, seed=place.seed
        )


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
        check_rates(self.lr, self.weight_decay, self.max_grad_norm)

    def check(self, work: Work) -> None:
        """It works everywhere."""

    def state_bytes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rules: Rules
    ) -> int:
        return 0

    def build(self, *, pieces: dict[str, Piece], rules: Rules, place: Place = ALONE) -> Optimizer:
        groups = groups_of(self.lr, self.weight_decay, pieces, rules)
        return torch.optim.SGD(groups, lr=self.lr, fused=True)


def check_rates(lr: float, weight_decay: float, max_grad_norm: float | None) -> None:
    """Raise ValueError for a value that no optimizer takes."""
    if not 0.0 < lr < math.inf:  # NaN too
        raise ValueError(f"optim.lr={lr} is not positive; set it above 0")
    if weight_decay < 0.0:
        raise ValueError(f"optim.weight_decay={weight_decay} is negative; set it to 0 or more")
    if max_grad_norm is not None and max_grad_norm <= 0.0:
        raise ValueError(
            f"optim.max_grad_norm={max_grad_norm} is not positive; "
            "set it above 0, or to null for off"
        )


def _check_known(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}={value} is unknown; set it to one of {', '.join(known)}")


def check_betas(key: str, betas: tuple[float, ...]) -> None:
    """Raise ValueError for a share of a running mean that is none."""
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{key}={list(betas)}: set each to 0 or more and below 1")
