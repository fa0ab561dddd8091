"""What the settings of an engine must offer."""

from typing import Protocol

import torch
from torch import nn

from models.layout import Layout
from trainer.mesh import Mesh
from trainer.optim import OptimSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.laid_out import LaidOut
from trainer.precision import Precision
from trainer.protocols import Engine
from trainer.schedule import Schedule


class EngineSpec(Protocol):
    """Settings of one engine: checks them against the model, lays it out, builds the engine."""

    @property
    def can_shard(self) -> bool:
        """Whether mesh.dp_shard says what is sharded."""
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
        micro_batches: int,
        precision: Precision,
    ) -> None:
        """Raise ValueError for what cannot work, with the legal choices; nothing is started."""
        ...

    def lay_out(
        self, model: nn.Module, layout: Layout, mesh: Mesh, precision: Precision
    ) -> LaidOut:
        """Prepare the meta model in place."""
        ...

    def build(
        self,
        *,
        laid_out: LaidOut,
        layout: Layout,
        mesh: Mesh,
        precision: Precision,
        device: torch.device,
        optim: OptimSpec,
        schedule: Schedule,
        seed: int,
        max_steps: int,
    ) -> Engine:
        """Return the engine over a materialised model. Collective."""
        ...
