"""The native engine: torch alone. One process, DDP or FSDP2 behind one `train_step`."""

import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import nn

from models.layout import Layout
from trainer.engines.native_trainer import NativeTrainer
from trainer.engines.passes import Keys, Passes, PlainPasses
from trainer.engines.pipelined import PipelinedPasses
from trainer.engines.protocol import Surroundings
from trainer.engines.repeatable import RepeatablePasses
from trainer.engines.topology_free import TreePasses
from trainer.float8 import Float8
from trainer.image_memory import check_memory
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.context_parallel import share_context
from trainer.parallel.data_parallel import cast_to_compute, named_blocks, replicate
from trainer.parallel.fully_sharded import FullySharded
from trainer.parallel.laid_out import LaidOut
from trainer.parallel.legal import check_axes, check_compiled, check_packed
from trainer.parallel.pieces import Splits
from trainer.parallel.pipeline import Elsewhere, Stages
from trainer.parallel.tensor_parallel import split_tensors
from trainer.precision import Precision


@dataclass(frozen=True, kw_only=True)
class NativeEngine:
    """Train with torch alone."""

    can_shard: ClassVar[bool] = True
    owns_sums: ClassVar[bool] = True
    owns_update: ClassVar[bool] = True

    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
    )
    """Whether blocks are computed again in the backward pass: less memory for more time."""
    compile: bool = False
    """Compile each block (torch.compile, static shapes): faster steps after a slower first one.
    `tessera train` keeps what was compiled in ~/.cache/tessera/compiled, for the next start."""
    fsdp: FullySharded = field(default_factory=FullySharded)
    """With mesh.dp_shard: how long gathered weights and whole gradients stay."""
    float8: Float8 = field(default_factory=Float8)
    """With precision=fp8: how values are rounded to 8 bits."""
    sequence_parallel: bool = True
    """With mesh.tp: between its layers, ranks share the tokens instead of repeating them."""
    pipeline_chunks: int = 1
    """With mesh.pp: stages on each rank, interleaved: less idle time, more messages."""
    offload_optimizer: bool = False
    """Keep optimizer state in the host's memory and update there: 8 bytes per parameter less on a
    GPU, two copies per step. On a CPU it only costs the copies."""

    def __post_init__(self) -> None:
        if self.pipeline_chunks < 1:
            raise ValueError(
                f"engine.pipeline_chunks={self.pipeline_chunks} is not positive; set it to 1"
            )

    @property
    def is_compiled(self) -> bool:
        return self.compile

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
        """Raise ValueError for what this machine, or this model on this mesh, cannot do."""
        cuts = {f"mesh.{name}={axes[name]}": axes[name] > 1 for name in ("pp", "dp_shard", "tp")}
        check_memory(model, cuts)
        check_packed(model, cuts | {"engine.compile=true": self.compile})
        if self.compile:
            check_compiled(model)
        check_axes(
            model, layout, axes, sequence=self.sequence_parallel, chunks=self.pipeline_chunks,
            row_tokens=row_tokens, micro_batches=micro_batches,
        )  # fmt: skip
        self.fsdp.check(layout, axes)
        self.float8.check(
            model, layout, axes,
            row_tokens=row_tokens, precision=precision, is_compiled=self.compile,
        )  # fmt: skip
        self.activation_checkpointing.check(is_compiled=self.compile)
        self.check_machine()

    def check_machine(self) -> None:
        """Raise ValueError where something has to be installed first."""
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if self.compile and not any(map(shutil.which, compilers)):
            raise ValueError(
                f"engine.compile=true needs a C++ compiler, found none ({', '.join(compilers)}); "
                "install one, or set engine.compile=false"
            )

    def lay_out(self, model: nn.Module, around: Surroundings) -> LaidOut:
        """Prepare the meta model in place: cut, split, recompute, compile, shard, by the mesh."""
        stages = None
        if around.mesh.size("pp") > 1:
            stages = Stages(model, around.layout, around.mesh, self.pipeline_chunks)
        parts = stages.parts if stages else [model]
        splits = [self._lay_out_part(part, around) for part in parts]
        return LaidOut(parts, splits, stages)

    def _lay_out_part(self, part: nn.Module, around: Surroundings) -> Splits:
        layout, mesh = around.layout, around.mesh
        splits: Splits = {}
        if mesh.size("tp") > 1:
            splits = split_tensors(part, layout, mesh, sequence=self.sequence_parallel)
        if mesh.size("cp") > 1:
            share_context(part, mesh.group("cp"))
        blocks = [
            block for _, block in named_blocks(part, layout) if not isinstance(block, Elsewhere)
        ]
        if around.precision.is_float8:
            self.float8.convert(part, layout)
        self.activation_checkpointing.apply(blocks, is_compiled=self.compile)
        if self.compile:
            for block in blocks:
                block.compile(dynamic=False)
        if mesh.is_sharded:
            self.fsdp.shard(part, layout, blocks, mesh, around.precision)
        return splits

    def build(self, laid_out: LaidOut, around: Surroundings) -> "NativeTrainer":
        """Return the engine over a materialised model."""
        mesh, precision, device = around.mesh, around.precision, around.device
        parts, keys = laid_out.parts, Keys(around.seed, mesh)
        sums_itself = around.is_topology_free or around.is_repeatable
        wrap = cast_to_compute if sums_itself else partial(replicate, mesh=mesh)
        called = [part if mesh.is_sharded else wrap(part, precision=precision) for part in parts]
        update = around.update(laid_out, is_offloaded=self.offload_optimizer)
        passes: Passes
        if around.is_topology_free:
            passes = TreePasses(called[0], mesh, keys, is_compiled=self.compile, sharding=self.fsdp)
        elif laid_out.stages is not None:
            shares = mesh.size("tp") if self.sequence_parallel else 1
            passes = PipelinedPasses(
                laid_out.stages, called, keys,
                device=device, dtype=precision.compute, token_shares=shares,
            )  # fmt: skip
        elif around.is_repeatable and not mesh.is_sharded:
            passes = RepeatablePasses(called[0], mesh, keys, is_compiled=self.compile)
        else:
            passes = PlainPasses(
                called[0], mesh, keys, is_compiled=self.compile, sharding=self.fsdp
            )
        is_narrow = mesh.is_sharded and precision.compute != precision.master
        return NativeTrainer(parts, passes, mesh, device, update, is_narrow=is_narrow)
