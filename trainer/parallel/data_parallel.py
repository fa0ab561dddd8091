"""FSDP2 over the planned model, and DDP or nothing where no weight is sharded."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from models.layout import Layout
from trainer.mesh import Mesh
from trainer.precision import Precision

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(model: nn.Module, blocks: list[nn.Module], mesh: Mesh, precision: Precision) -> None:
    """Apply `fully_shard` to every block and to the root, in place, while the model is on meta.

    Embedding and head stay in the root's group: tied weights must share one group, or FSDP2 unties
    them without a word.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=precision.compute,
        reduce_dtype=precision.master,
        # The only float input is the loss scale: casting it to bf16 would change the gradient.
        cast_forward_inputs=False,
    )
    device_mesh = mesh.shard_mesh
    for block in blocks:
        fully_shard(block, mesh=device_mesh, mp_policy=policy)
    fully_shard(model, mesh=device_mesh, mp_policy=policy)


def gather_once(model: nn.Module) -> None:
    """Gather each unit of FSDP2 once, and let it go again. Collective.

    A unit that no forward pass has run yet ends the first backward pass that keeps its gradients in
    another dtype: FSDP2 looks there for weights that it has never gathered (torch 2.11 to 2.13). So
    it is with tower and gated blocks where a run begins with text.
    """
    for module in model.modules():
        if is_fsdp(module):
            module.unshard()
            module.reshard()


def named_blocks(model: nn.Module, layout: Layout) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the layout's block patterns name and the model has, in order."""
    for pattern in layout.blocks:
        prefix, _, rest = pattern.partition(".*")
        assert not rest, f"layout.blocks={pattern!r} must end in .*"
        for name, block in model.get_submodule(prefix).named_children():
            yield f"{prefix}.{name}", block


class ComputeCast(nn.Module):
    """Run a module with weights cast to the compute dtype; gradients arrive in the master dtype.

    The same numbers as FSDP2's mixed precision: autocast would keep activations in fp32 instead.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cast = {name: weight.to(self.dtype) for name, weight in self.module.named_parameters()}
        return functional_call(self.module, cast, args, kwargs)


def cast_to_compute(model: nn.Module, precision: Precision) -> nn.Module:
    """Return what is called for `model`: with weight casts as needed."""
    is_cast = precision.compute != precision.master
    return ComputeCast(model, precision.compute) if is_cast else model


def replicate(model: nn.Module, mesh: Mesh, precision: Precision) -> nn.Module:
    """Return what is called for `model`: with weight casts and gradient averaging as needed."""
    model = cast_to_compute(model, precision)
    trains = any(parameter.requires_grad for parameter in model.parameters())  # not: a stage
    if mesh.token_size > 1 and trains:
        # Buffers are constants that each rank computes: nothing to broadcast at every forward.
        names = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        # init_sync: the weights are equal already, each rank made them from their names.
        model = DistributedDataParallel(
            model, process_group=mesh.token_group, gradient_as_bucket_view=True, init_sync=False
        )
    return model


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Say whether the next backward reduces gradients over ranks or keeps them for the next one."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled


def is_fsdp(module: nn.Module) -> TypeGuard["FSDPModule"]:
    """Whether it is a unit of FSDP2. None is before something imported the class: over a second."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
