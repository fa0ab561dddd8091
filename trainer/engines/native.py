"""The native engine: torch alone. One process, DDP or FSDP2 behind one `train_step`."""

import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layout import Layout
from models.nn.cache import Cache
from models.nn.head import Loss
from models.nn.vision_text import VisionTextTrunk, trains_on_images
from trainer.batch import Batch
from trainer.engines.counting import count_step
from trainer.engines.micro_batches import prepared
from trainer.engines.passes import Keys, Passes, PlainPasses, cache_for
from trainer.engines.pipelined import PipelinedPasses
from trainer.engines.protocol import Surroundings
from trainer.engines.repeatable import RepeatablePasses
from trainer.engines.topology_free import TreePasses
from trainer.engines.update import Update
from trainer.image_memory import check_memory
from trainer.mesh import Mesh
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.context_parallel import share_context
from trainer.parallel.data_parallel import (
    cast_to_compute,
    gather_once,
    named_blocks,
    replicate,
    shard,
)
from trainer.parallel.laid_out import LaidOut
from trainer.parallel.legal import check_axes, check_packed
from trainer.parallel.pieces import Splits
from trainer.parallel.pipeline import Elsewhere, Stages
from trainer.parallel.tensor_parallel import split_tensors
from trainer.pieces import Piece
from trainer.precision import Precision
from trainer.protocols import StepResult


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
        check_axes(
            model, layout, axes, sequence=self.sequence_parallel, chunks=self.pipeline_chunks,
            row_tokens=row_tokens, micro_batches=micro_batches,
        )  # fmt: skip
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
        self.activation_checkpointing.apply(blocks)
        if self.compile:
            for block in blocks:
                block.compile(dynamic=False)
        if mesh.is_sharded:
            shard(part, blocks, mesh, around.precision)
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
            passes = TreePasses(called[0], mesh, keys, is_compiled=self.compile)
        elif laid_out.stages is not None:
            shares = mesh.size("tp") if self.sequence_parallel else 1
            passes = PipelinedPasses(
                laid_out.stages, called, keys,
                device=device, dtype=precision.compute, token_shares=shares,
            )  # fmt: skip
        elif around.is_repeatable and not mesh.is_sharded:
            passes = RepeatablePasses(called[0], mesh, keys, is_compiled=self.compile)
        else:
            passes = PlainPasses(called[0], mesh, keys, is_compiled=self.compile)
        is_narrow = mesh.is_sharded and precision.compute != precision.master
        return NativeTrainer(parts, passes, mesh, device, update, is_narrow=is_narrow)


class NativeTrainer:
    """Owns the model, its passes and its update; see the Engine protocol."""

    def __init__(
        self,
        parts: list[nn.Module],
        passes: Passes,
        mesh: Mesh,
        device: torch.device,
        update: Update,
        *,
        is_narrow: bool,
    ) -> None:
        """`is_narrow`: FSDP2 gathers weights in another dtype than gradients are kept in."""
        self.parts, self.passes, self.mesh, self.device = parts, passes, mesh, device
        self.update = update
        # DDP reduces what has a gradient in the last backward pass, and waits for all. FSDP2 widens
        # gradients behind each pass but the last, and then wants one dtype in a unit: so all of
        # them need one in the first pass too.
        places = (0, -1) if is_narrow else (-1,)
        self.with_image = places if any(map(trains_on_images, parts)) else ()
        for part in parts if is_narrow else ():
            if any(isinstance(module, VisionTextTrunk) for module in part.modules()):
                gather_once(part)

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        micro_batches = prepared(micro_batches, self.device, self.with_image)
        counts, of_sources = count_step(micro_batches, num_tokens, self.mesh, self.device)
        # DDP and FSDP2 average gradients over ranks with different tokens; this makes them the mean
        # over all targets of the step.
        scale = self.passes.averaged_over / counts[0].clamp(min=1).double()
        self._set_training(True)
        sums = self.passes.train(step, micro_batches, scale)
        loss_sum, by_source = sums[0], torch.stack((sums[1:], of_sources))
        grad_norm = self.update.grad_norm()
        verdict = self.update.guard.judge(loss_sum, counts[0], grad_norm)
        lr = self.update.apply(step, grad_norm, verdict)
        return StepResult(
            loss_sum, *counts, grad_norm, verdict.skipped, lr, verdict.flags, by_source
        )

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Loss:
        self._set_training(False)
        return self.passes.loss(batch.to(self.device))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        self._set_training(False)
        length = batch.input_ids.shape[1]
        batch = batch.padded(-length % self.mesh.row_multiple).to(self.device)
        return self.passes.logits(batch)[:, :length]

    def new_cache(self) -> Cache | None:
        return cache_for(self.parts[0], self.mesh)

    @torch.no_grad()
    def next_logits(self, batch: Batch, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.logits(batch)[:, -1]
        assert isinstance(self.passes, PlainPasses), "stages keep no cache"
        self._set_training(False)
        return self.passes.next_logits(batch.to(self.device), cache)

    def _set_training(self, mode: bool) -> None:
        for part in self.parts:
            part.train(mode)

    def weights(self) -> dict[str, Piece]:
        return self.update.pieces

    def optimizer_state(self) -> dict[str, Piece]:
        return self.update.state()

    @property
    def writes(self) -> bool:
        return self.mesh.is_first_copy

    def loaded(self) -> None:
        self.update.loaded()

    def close(self) -> None:
        torch.compiler.reset()  # graphs, where blocks were compiled
