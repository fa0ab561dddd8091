"""Passes whose sums do not depend on how many ranks there are: `deterministic=topology_free`."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.batch import Batch
from trainer.engines.counting import loss_sums
from trainer.engines.passes import Keys, PlainPasses
from trainer.mesh import Mesh
from trainer.parallel.fully_sharded import MICRO_BATCH, FullySharded
from trainer.parallel.pieces import is_dtensor
from trainer.parallel.tree import TreeSum, pairwise_sum, reduce_pairwise, summed_share
from trainer.precision import Precision

NUM_THREADS = 1  # of a CPU rank: how many threads share a sum decides the order of its additions


def check_topology_free(
    axes: dict[str, int],
    *,
    owns_sums: bool,
    micro_rows: int | None,
    precision: Precision,
    has_gpu: bool,
    sharding: FullySharded | None,
) -> None:
    """Raise ValueError for a run that cannot be the same bits on other meshes."""
    key = "deterministic=topology_free"
    if not owns_sums:
        raise ValueError(
            f"{key} needs every sum to be ours; set engine=native, or deterministic=off"
        )
    for axis in ("pp", "cp", "tp"):
        if axes[axis] > 1:
            raise ValueError(
                f"{key}: mesh.{axis}={axes[axis]} cuts products into parts that add up in another "
                f"order; set mesh.{axis}=1, or deterministic=off"
            )
    ranks = axes["dp_replicate"] * axes["dp_shard"]
    if ranks & (ranks - 1):
        raise ValueError(
            f"{key} adds up in a binary tree, which {ranks} data ranks do not make; "
            f"start 1, 2, 4, 8, .. of them, or set deterministic=off"
        )
    if axes["dp_shard"] > 1 and axes["dp_replicate"] > 2:
        raise ValueError(
            f"{key}: mesh.dp_replicate={axes['dp_replicate']} copies of a sharded model are summed "
            "in an order that is the library's; set mesh.dp_replicate to 1 or 2"
        )
    if micro_rows is None:
        raise ValueError(
            f"{key} needs micro-batches of one size on every number of ranks; set data.micro_rows"
        )
    if precision.master == torch.bfloat16:
        raise ValueError(
            f"{key}: an update in bf16 rounds the last elements of a tensor otherwise; "
            "set precision=bf16, whose weights are fp32"
        )
    if sharding is not None and sharding.gradient_sync == MICRO_BATCH:
        raise ValueError(
            f"engine.fsdp.gradient_sync={MICRO_BATCH} has no effect with {key}, whose tree sums "
            "the gradients of each micro-batch anyway; leave it out"
        )
    if has_gpu:
        raise ValueError(f"{key} is proved on CPUs only; set deterministic=off")


class _Gradients(Protocol):
    """Moves gradients between parameters and the tree."""

    def take(self) -> list[Tensor]:
        """Return this round's sum over the ranks, or this rank's share of it. Collective."""
        ...

    def put(self, total: list[Tensor]) -> None:
        """Leave the step's sum in the parameters. Collective."""
        ...


class _Whole:
    """Of copies: each rank adds up its share of the elements, and shows the others at the end."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.sizes = [parameter.numel() for parameter in parameters]

    def take(self) -> list[Tensor]:
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        return [summed_share(F.pad(flat, (0, -len(flat) % self.group.size())), self.group)]

    def put(self, total: list[Tensor]) -> None:
        (share,) = total
        if self.group.size() > 1:
            whole = share.new_empty(self.group.size() * len(share))
            dist.all_gather(list(whole.chunk(self.group.size())), share, group=self.group)
            share = whole
        gradients = share[: sum(self.sizes)].split(self.sizes)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view(parameter.shape)


class _Sharded:
    """Of FSDP2 units: the reduce-scatter within each backward pass has added up the round."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def take(self) -> list[Tensor]:
        self.last = [_gradient(parameter) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return [_local(gradient) for gradient in self.last]

    def put(self, total: list[Tensor]) -> None:
        for parameter, gradient, local in zip(self.parameters, self.last, total, strict=True):
            _local(gradient).copy_(local)
            parameter.grad = gradient


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if is_dtensor(tensor) else tensor


class TreePasses(PlainPasses):
    """One micro-batch after the other; gradients and losses are summed in a fixed tree."""

    def __init__(
        self, called: nn.Module, mesh: Mesh, keys: Keys, *, is_compiled: bool,
        sharding: FullySharded,
    ) -> None:  # fmt: skip
        """`called` averages nothing itself. The tree takes the sums, whatever `sharding` says."""
        super().__init__(called, mesh, keys, is_compiled=is_compiled, sharding=sharding)
        self.group, self.averaged_over = mesh.token_group, 1
        parameters = [parameter for parameter in called.parameters() if parameter.requires_grad]
        self.gradients: _Gradients
        if mesh.is_sharded:
            reduce_pairwise(called)
            self.gradients = _Sharded(parameters)
        else:
            self.gradients = _Whole(parameters, self.group)

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        tree, sums = TreeSum(), []
        for number, batch in enumerate(micro_batches):
            self.sharding.keep_gathered(self._model, is_last=number == len(micro_batches) - 1)
            self.keys.start(step, number)
            loss = self._loss(batch, scale)
            loss.objective.backward()
            sums.append(loss_sums(loss, batch))
            tree.push(self.gradients.take())
        self.gradients.put(tree.total())
        return pairwise_sum(self.mesh.in_order(torch.stack(sums)))
