"""The deepspeed engine: raw DeepSpeed, ZeRO 0 to 3, with the same loop, data and checkpoint."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from models.layout import Layout
from trainer.engines.deepspeed_config import check_settings, config_for
from trainer.engines.deepspeed_state import initialize
from trainer.engines.deepspeed_trainer import DeepSpeedTrainer
from trainer.engines.protocol import Surroundings
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.laid_out import LaidOut
from trainer.pieces import Piece
from trainer.precision import PRECISIONS, Precision

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedEngine:
    """Train with DeepSpeed over data-parallel ranks."""

    can_shard: ClassVar[bool] = False
    owns_sums: ClassVar[bool] = False

    stage: int = 2
    """ZeRO: 0 copies all, 1 shards the optimizer, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep optimizer state on the CPU and update there (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights on the CPU (stage 3)."""
    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
    )
    config: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, in the layout of its JSON file. Unknown keys are errors."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"engine.stage={self.stage} is unknown; set it to one of {STAGES}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "engine.offload_optimizer=true needs a sharded optimizer; set engine.stage to 1, 2 "
                "or 3"
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"engine.offload_parameters=true needs engine.stage=3, found {self.stage}; set it, "
                "or engine.offload_parameters=false"
            )
        check_settings(self.config)

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
        """Raise ValueError for a mesh or a precision that is not DeepSpeed's here."""
        for axis in ("pp", "cp", "tp"):
            if axes[axis] > 1:
                raise ValueError(
                    f"mesh.{axis}={axes[axis]} is not for engine=deepspeed; "
                    f"use engine=native, or mesh.{axis}=1"
                )
        if axes["dp_shard"] > 1:
            raise ValueError(
                f"mesh.dp_shard={axes['dp_shard']} has no effect with engine=deepspeed, whose "
                "engine.stage says what is sharded; set mesh=ddp"
            )
        if precision not in (PRECISIONS["fp32"], PRECISIONS["bf16"]):
            raise ValueError(
                "engine=deepspeed trains in precision=fp32 or bf16; set one of them, or use "
                "engine=native"
            )

    def lay_out(self, model: nn.Module, around: Surroundings) -> LaidOut:
        """Prepare the meta model in place: recompute. DeepSpeed shards what is materialised."""
        blocks = [block for _, block in named_blocks(model, around.layout)]
        self.activation_checkpointing.apply(blocks)
        return LaidOut([model], [{}], None)

    def build(self, laid_out: LaidOut, around: Surroundings) -> DeepSpeedTrainer:
        """Return the engine over a materialised model."""
        (model,) = laid_out.parts
        pieces = {
            name: Piece.of(parameter)
            for name, parameter in laid_out.parameters().items()
            if parameter.requires_grad
        }
        optimizer = around.optim.build(pieces=pieces, no_decay=around.no_decay)
        lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # stage 3 takes a step over zero gradients when it is built
        masters = {n: p.detach().clone() for n, p in laid_out.parameters().items()}
        engine = initialize(model, optimizer, config_for(self, around), around.device)
        return DeepSpeedTrainer(engine, self.stage, lrs, masters, around)
