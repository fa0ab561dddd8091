"""The settings of Muon: which weights it takes, and what AdamW keeps of the rest."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from models.layout import Layout
from trainer.optim import AdamW, Optimizer, check_betas
from trainer.optimizers.lean_adamw import WEIGHTS
from trainer.optimizers.muon import MuonOptimizer
from trainer.optimizers.place import ALONE, Place
from trainer.optimizers.rules import Rules, groups_of
from trainer.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonal momentum for the matrices of the blocks; AdamW for all else.

    Embedding, head, norms, biases, gates and convolutions are all else. One learning rate and decay
    serve both. Source: Jordan et al. 2024; Liu et al. 2025 (arXiv 2502.16982).
    """

    lr: float
    """Learning rate where the schedule's factor is 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's: how much of its running means a step keeps."""
    eps: float = 1e-8
    """AdamW's: added to the root of the mean square, against division by nothing."""
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases, gates and embeddings."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: no clipping."""
    states: str = WEIGHTS
    """AdamW's: how its running means are kept, `weights`, `bf16` or `8bit`."""
    momentum: float = 0.95
    """How much of the running mean of the gradient a step keeps."""
    num_iterations: int = 5
    """Newton-Schulz iterations, in the dtype that the step computes in."""

    def __post_init__(self) -> None:
        _ = self.rest  # checks the settings that are its own
        check_betas("optim.momentum", (self.momentum,))
        if not 0 < self.num_iterations <= 100:
            raise ValueError(
                f"optim.num_iterations={self.num_iterations} is out of range; set it to 5"
            )

    @property
    def rest(self) -> AdamW:
        """The settings of what updates all else."""
        return AdamW(
            lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm, states=self.states,
        )  # fmt: skip

    def check(
        self,
        model: nn.Module,
        layout: Layout,
        axes: dict[str, int],
        rules: Rules,
        *,
        owns_update: bool,
        is_offloaded: bool,
    ) -> None:
        self.rest.check(
            model, layout, axes, rules, owns_update=owns_update, is_offloaded=is_offloaded
        )
        if not owns_update:
            raise ValueError(
                "optim=muon needs whole matrices, and DeepSpeed's optimizers see flat shares; "
                "set optim=adamw, or use engine=native"
            )
        if is_offloaded:
            raise ValueError(
                "engine.offload_optimizer=true would multiply optim=muon's matrices on the host; "
                "set it to false, or optim=adamw"
            )
        if not rules.matrices:
            raise ValueError(
                "optim=muon finds no matrix of a block that trains (factors of adapters are none); "
                "set optim=adamw"
            )

    def state_bytes(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rules: Rules
    ) -> int:
        if name in rules.matrices:
            return math.prod(shape) * dtype.itemsize
        return self.rest.state_bytes(name, shape, dtype, rules)

    def build(self, *, pieces: dict[str, Piece], rules: Rules, place: Place = ALONE) -> Optimizer:
        matrices = {name: piece for name, piece in pieces.items() if name in rules.matrices}
        others = {name: piece for name, piece in pieces.items() if name not in matrices}
        return MuonOptimizer(
            groups_of(self.lr, self.weight_decay, matrices, rules), matrices,
            self.rest.build(pieces=others, rules=rules, place=place) if others else None,
            matrices=rules.matrices, place=place, momentum=self.momentum,
            num_iterations=self.num_iterations,
        )  # fmt: skip
