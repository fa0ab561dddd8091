"""The deepspeed engine: raw DeepSpeed, ZeRO 0 to 3, with the same loop, data and checkpoint."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from models.layout import Layout
from trainer.engines.deepspeed_config import check_groups, check_settings, config_for
from trainer.engines.deepspeed_state import ShardedState, initialize
from trainer.engines.deepspeed_trainer import DeepSpeedTrainer
from trainer.engines.protocol import Surroundings
from trainer.image_memory import check_memory
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.context_parallel import share_context
from trainer.parallel.data_parallel import named_blocks
from trainer.parallel.laid_out import LaidOut
from trainer.parallel.legal import check_axes, check_exchange, check_packed
from trainer.parallel.pieces import Splits
from trainer.parallel.tensor_parallel import split_tensors
from trainer.parallel.ulysses import Ulysses
from trainer.precision import PRECISIONS, Precision

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedEngine:
    """Train with DeepSpeed: ZeRO over the ranks that see different tokens, tensors split by us."""

    can_shard: ClassVar[bool] = False
    owns_sums: ClassVar[bool] = False
    owns_update: ClassVar[bool] = False
    is_compiled: ClassVar[bool] = False

    stage: int = 2
    """ZeRO: 0 copies all, 1 shards the optimizer, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep optimizer state on the CPU and update there (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights on the CPU (stage 3)."""
    sequence_parallel: bool = True
    """With mesh.tp: between its layers, ranks share the tokens instead of repeating them."""
    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
    )
    """Whether blocks are computed again in the backward pass: less memory for more time."""
    config: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, in the layout of its JSON file. Unknown keys are errors, as are
    those that a setting of ours decides."""

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
        micro_batches: int | None,
        precision: Precision,
    ) -> None:
        """Raise ValueError for a mesh, a precision or a config that is not DeepSpeed's here."""
        for check in (check_packed, check_memory):
            check(model, {"engine=deepspeed": True})
        if axes["pp"] > 1:
            raise ValueError(
                f"mesh.pp={axes['pp']} is not for engine=deepspeed, whose pipelines need a model "
                "of their own kind; set mesh.pp=1, or use engine=native"
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
        if precision.compute == torch.bfloat16 and self.stage == 0:
            raise ValueError(
                "engine.stage=0 keeps no fp32 weights beside those of precision=bf16 that a "
                "checkpoint could hold; set engine.stage to 1, 2 or 3"
            )
        check_axes(
            model, layout, axes, sequence=self.sequence_parallel, chunks=1,
            row_tokens=row_tokens, micro_batches=micro_batches,
        )  # fmt: skip
        check_exchange(model, layout, axes["cp"], axes["tp"])
        check_groups(self.config, self.stage)

    def lay_out(self, model: nn.Module, around: Surroundings) -> LaidOut:
        """Prepare the meta model in place: split, recompute. DeepSpeed shards what is filled."""
        layout, mesh = around.layout, around.mesh
        splits: Splits = {}
        if mesh.size("tp") > 1:
            splits = split_tensors(model, layout, mesh, sequence=self.sequence_parallel)
        if mesh.size("cp") > 1:
            share_context(model, mesh.group("cp"), Ulysses)
        self.activation_checkpointing.apply([block for _, block in named_blocks(model, layout)])
        return LaidOut([model], [splits], None)

    def build(self, laid_out: LaidOut, around: Surroundings) -> DeepSpeedTrainer:
        """Return the engine over a materialised model."""
        (model,) = laid_out.parts
        pieces, parameters = laid_out.pieces(), laid_out.parameters()
        trained = {
            name: pieces[name].like(parameter)
            for name, parameter in parameters.items()
            if parameter.requires_grad
        }
        optimizer = around.optim.build(pieces=trained, rules=around.rules, place=around.place)
        assert isinstance(optimizer, torch.optim.Optimizer)  # `optim.check`
        number_of = {
            id(parameter): number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        groups = {name: number_of[id(piece.local)] for name, piece in trained.items()}
        lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # stage 3 takes a step over zero gradients when it is built
        masters = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        config = config_for(self, around)
        # DeepSpeed's flat weights take their place: a piece that kept them would be a second copy.
        shapes = {
            name: piece.like(piece.local.detach().to("meta")) for name, piece in pieces.items()
        }
        del pieces, trained
        engine = initialize(model, optimizer, config, around.mesh, around.device)
        state = ShardedState(engine, self.stage, around.mesh, masters, shapes, groups)
        return DeepSpeedTrainer(state, lrs, around)
