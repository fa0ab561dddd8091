"""What the settings of an engine must offer."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from models.layout import Layout
from trainer.engines.update import FAST, TOPOLOGY_FREE, Update
from trainer.mesh import Mesh
from trainer.numerics.guard import Guard
from trainer.numerics.spike import SpikeSpec
from trainer.optim import OptimSpec
from trainer.optimizers.place import Place
from trainer.optimizers.rules import Rules
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.laid_out import LaidOut
from trainer.precision import Precision
from trainer.protocols import Engine
from trainer.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an engine is built from, beside the model and its own settings."""

    layout: Layout
    mesh: Mesh
    precision: Precision
    device: torch.device
    optim: OptimSpec
    schedule: Schedule
    seed: int
    max_steps: int
    rules: Rules = field(default_factory=Rules)
    """Which weights are updated otherwise than the rest."""
    is_topology_free: bool = False
    """Whether sums are taken in an order that no number of data ranks changes."""
    is_repeatable: bool = False
    """Whether sums over ranks are taken in the same order at every step of every start."""
    guard: Guard = field(default_factory=lambda: Guard(SpikeSpec()))
    """Judges each step before its update."""

    @property
    def place(self) -> Place:
        """What an optimizer has to know of all this."""
        return Place(seed=self.seed, compute=self.precision.compute, mesh=self.mesh)

    def update(self, laid_out: LaidOut, *, is_offloaded: bool = False) -> Update:
        """Return the end of a step over materialised weights."""
        return Update(
            laid_out.parameters(), laid_out.pieces(), laid_out.trained(), mesh=self.mesh,
            optim=self.optim, rules=self.rules, place=self.place,
            schedule=self.schedule, max_steps=self.max_steps, device=self.device,
            sums=TOPOLOGY_FREE if self.is_topology_free else FAST, is_offloaded=is_offloaded,
            guard=self.guard,
        )  # fmt: skip


class EngineSpec(Protocol):
    """Settings of one engine: checks them against the model, lays it out, builds the engine."""

    @property
    def can_shard(self) -> bool:
        """Whether mesh.dp_shard says what is sharded."""
        ...

    @property
    def owns_sums(self) -> bool:
        """Whether all sums over ranks are ours to order."""
        ...

    @property
    def owns_update(self) -> bool:
        """Whether the update is ours, by any optimizer."""
        ...

    @property
    def is_compiled(self) -> bool:
        """Whether blocks are compiled."""
        ...

    @property
    def offload_optimizer(self) -> bool:
        """Whether the update is done on the host."""
        ...

    @property
    def activation_checkpointing(self) -> ActivationCheckpointing: ...

    def check(
        self,
        model: nn.Module,
        layout: Layout,
        axes: dict[str, int],
        *,
        row_tokens: int,
        micro_batches: int | None,
        precision: Precision,
    ) -> None:
        """Raise ValueError for what cannot work, with the legal choices; nothing is started."""
        ...

    def lay_out(self, model: nn.Module, around: Surroundings) -> LaidOut:
        """Prepare the meta model in place."""
        ...

    def build(self, laid_out: LaidOut, around: Surroundings) -> Engine:
        """Return the engine over a materialised model. Collective."""
        ...
