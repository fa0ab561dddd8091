"""The accelerate engine: the model wrapped by Hugging Face's Accelerator, all else ours.

The home of the package accelerate, imported when an engine is built. What of it would change the
numbers stays out: it divides no loss, steps no schedule and touches no data.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.layout import Layout
from trainer.batch import Batch
from trainer.engines.counting import loss_sums, no_loss
from trainer.engines.native_trainer import NativeTrainer
from trainer.engines.passes import Keys, PlainPasses
from trainer.engines.protocol import Surroundings
from trainer.mesh import Mesh
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.data_parallel import cast_to_compute, named_blocks
from trainer.parallel.laid_out import LaidOut
from trainer.precision import Precision

FOLLOWED = ("ACCELERATE_USE_", "ACCELERATE_FP8_", "ACCELERATE_TORCH_DEVICE")
"""How variables begin that no argument of Accelerator takes the place of."""


@dataclass(frozen=True, kw_only=True)
class AccelerateEngine:
    """Train with an Accelerator over data-parallel ranks."""

    can_shard: ClassVar[bool] = False
    owns_sums: ClassVar[bool] = False
    owns_update: ClassVar[bool] = True
    is_compiled: ClassVar[bool] = False
    offload_optimizer: ClassVar[bool] = False

    ddp: dict[str, Any] = field(default_factory=dict)
    """Settings of accelerate's DistributedDataParallelKwargs, for several processes. Unknown ones
    are errors, and those of hooks: how gradients are summed is not accelerate's to say."""
    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
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
        """Raise ValueError for what accelerate would silently turn into plain copies."""
        for axis in ("pp", "dp_shard", "cp", "tp"):
            if axes[axis] > 1:
                raise ValueError(
                    f"mesh.{axis}={axes[axis]}: accelerate would run copies of the whole model "
                    "and say nothing; use engine=native, or mesh=ddp"
                )
        if precision.is_float8:
            raise ValueError("precision=fp8 needs engine=native; set it, or precision=bf16")
        self._check_ddp(axes["dp_replicate"])
        for name, value in sorted(os.environ.items()):
            if name.startswith(FOLLOWED) and value.lower() != "false":  # what its launcher leaves
                raise ValueError(
                    f"{name} is set, and accelerate would follow it instead of this config; "
                    "unset it"
                )

    def _check_ddp(self, num_processes: int) -> None:
        """Raise ValueError for settings that DDP does not have, or would not be told."""
        from accelerate.utils import DistributedDataParallelKwargs

        every = fields(DistributedDataParallelKwargs)
        known = {one.name: type(one.default) for one in every if not one.name.startswith("comm_")}
        for key, value in self.ddp.items():
            if key not in known:
                raise ValueError(
                    f"engine.ddp.{key} is no setting of DistributedDataParallelKwargs that applies "
                    f"here; set one of {', '.join(known)}"
                )
            if type(value) is not known[key]:
                raise ValueError(
                    f"engine.ddp.{key}={value!r} is of type {type(value).__name__}; set it to one "
                    f"of type {known[key].__name__}"
                )
            if num_processes == 1:
                raise ValueError(
                    f"engine.ddp.{key}={value!r} has no effect on one process; leave it out, or "
                    "start several"
                )

    def lay_out(self, model: nn.Module, around: Surroundings) -> LaidOut:
        """Prepare the meta model in place: recompute."""
        blocks = [block for _, block in named_blocks(model, around.layout)]
        self.activation_checkpointing.apply(blocks)
        return LaidOut([model], [{}], None)

    def build(self, laid_out: LaidOut, around: Surroundings) -> NativeTrainer:
        """Return the engine over a materialised model."""
        mesh, precision, device = around.mesh, around.precision, around.device
        (model,) = laid_out.parts
        accelerator = _accelerator(self.ddp, mesh, device)
        prepared = accelerator.prepare(cast_to_compute(model, precision))
        # After it, not before: accelerate may give the weights other memory.
        update = around.update(laid_out)
        passes = _AcceleratedPasses(accelerator, prepared, mesh, Keys(around.seed, mesh))
        return NativeTrainer([model], passes, mesh, device, update, is_narrow=False)


def _accelerator(ddp: dict[str, Any], mesh: Mesh, device: torch.device) -> Any:
    """Return an Accelerator that runs what was asked for; RuntimeError if it runs another thing."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # Else it sets the number of threads to its own liking.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        # What is not said here it takes from variables that its launcher sets: ACCELERATE_*.
        mixed_precision="no",
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(**ddp)],
    )
    runs = (accelerator.num_processes, accelerator.process_index)
    wanted = (mesh.token_size, mesh.dp_rank)
    if runs != wanted:
        raise RuntimeError(f"accelerate runs as (processes, rank) = {runs}, needed {wanted}")
    return accelerator


class _AcceleratedPasses(PlainPasses):
    """Backward passes and gradient sync through the Accelerator."""

    def __init__(self, accelerator: Any, called: nn.Module, mesh: Mesh, keys: Keys) -> None:
        super().__init__(called, mesh, keys, is_compiled=False)
        self.accelerator = accelerator

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        sums = no_loss(micro_batches[0], scale.device)
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            self.keys.start(step, number)
            with nullcontext() if is_last else self.accelerator.no_sync(self._model):
                loss = self._loss(batch, scale)
                self.accelerator.backward(loss.objective)
            sums += loss_sums(loss, batch)
        return self.mesh.sum_over_tokens(sums)
