"""The blocks of a planned model, and DDP or nothing where no weight is sharded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from models.layout import Layout
from trainer.mesh import Mesh
from trainer.precision import Precision


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
    """Say whether the next backward pass of DDP reduces gradients or keeps them for the next."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled
