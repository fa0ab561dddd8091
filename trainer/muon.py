"""The settings of Muon: which weights it takes, and what AdamW keeps of the rest."""

import math
from dataclasses import dataclass, fields

import torch

from trainer.optim import AdamSettings, AdamW, Optimizer, check_betas
from trainer.optimizers.muon import MuonOptimizer
from trainer.optimizers.place import ALONE, Place, Work
from trainer.optimizers.rules import Rules, groups_of
from trainer.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Muon(AdamSettings):
    """Orthogonal momentum for the matrices of the blocks; AdamW for all else.

    Embedding, head, norms, biases, gates and convolutions are all else. One learning rate and decay
    serve both; betas, eps and states are AdamW's. Source: Jordan et al. 2024; Liu et al. 2025
    (arXiv 2502.16982).
    """

    momentum: float = 0.95
    """How much of the running mean of the gradient a step keeps."""
    num_iterations: int = 5
    """Newton-Schulz iterations, in the dtype that the step computes in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas("optim.momentum", (self.momentum,))
        if not 0 < self.num_iterations <= 100:
            raise ValueError(
                f"optim.num_iterations={self.num_iterations} is out of range; set it to 5"
            )

    @property
    def rest(self) -> AdamW:
        """The settings of what updates all else."""
        return AdamW(**{one.name: getattr(self, one.name) for one in fields(AdamSettings)})

    def check(self, work: Work) -> None:
        self.rest.check(work)
        if not work.owns_update:
            raise ValueError(
                "optim=muon needs whole matrices, and DeepSpeed's optimizers see flat shares; "
                "set optim=adamw, or use engine=native"
            )
        if work.is_offloaded:
            raise ValueError(
                "engine.offload_optimizer=true would multiply optim=muon's matrices on the host; "
                "set it to false, or optim=adamw"
            )
        if not work.rules.matrices:
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
