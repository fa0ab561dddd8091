"""Passes whose gradients are added up in the same order at every step: `deterministic=run`."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.batch import Batch
from trainer.engines.passes import Keys, PlainPasses
from trainer.mesh import Mesh

BUCKET_ELEMENTS = 1 << 23  # in one all-reduce


class RepeatablePasses(PlainPasses):
    """One micro-batch after the other; copies add up their gradients behind the last one.

    DDP arranges its buckets anew after the first step of a process. Where an element lies decides
    in which order ring all-reduces add it up: the step after a restart would have other bits. Here
    buckets follow the order of the parameters. The price: no message overlaps the backward pass.
    """

    def __init__(self, called: nn.Module, mesh: Mesh, keys: Keys, *, is_compiled: bool) -> None:
        """`called` averages nothing itself."""
        super().__init__(called, mesh, keys, is_compiled=is_compiled)
        self.averaged_over = 1
        self.parameters = [each for each in called.parameters() if each.requires_grad]

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        sums = super().train(step, micro_batches, scale)
        if self.mesh.token_size > 1:
            for bucket in self._buckets():
                _sum_gradients(bucket, self.mesh.token_group)
        return sums

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        bucket: list[nn.Parameter] = []
        for parameter in self.parameters:
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(parameter)
        if bucket:
            yield bucket


def _sum_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    for parameter in parameters:
        if parameter.grad is None:  # no image in the rows of this rank, for one
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
