"""Which piece of each parameter this rank holds, and sums over all pieces of a tensor."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.pieces import Piece


def piece_of(tensor: Tensor) -> Piece:
    """Return this rank's piece of a plain tensor (all of it) or of a DTensor sharded on dim 0."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(local=local_tensor(tensor), shape=shape, start=0, stop=tensor.numel())
    for placement in tensor.placements:
        if isinstance(placement, Shard) and placement.dim != 0:
            raise AssertionError(f"piece of a tensor sharded on dim {placement.dim} is no range")
    local_shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    row = math.prod(shape[1:])
    start = min(offset[0], shape[0]) * row if shape else 0
    return Piece(
        local=local_tensor(tensor), shape=shape, start=start, stop=start + math.prod(local_shape)
    )


def named_pieces(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Piece]:
    """Return the piece of each parameter by name."""
    return {name: piece_of(parameter) for name, parameter in parameters}


def global_square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares over the whole tensors, each element once, in at least fp32.

    Shards are summed over the mesh axes that shard them; replicas are not added up. Collective:
    every rank of those axes must call this with the same tensors in the same order.
    """
    totals: dict[tuple[object, ...], Tensor] = {}
    groups: dict[tuple[object, ...], list[torch.distributed.ProcessGroup]] = {}
    for tensor in tensors:
        local, key, axes = _local_and_axes(tensor)
        wide = torch.promote_types(local.dtype, torch.float32)
        square = torch.linalg.vector_norm(local, dtype=wide).square()
        totals[key] = totals[key] + square if key in totals else square
        groups[key] = axes
    for key, axes in groups.items():
        for group in axes:
            torch.distributed.all_reduce(totals[key], group=group)
    return torch.stack(list(totals.values())).sum()


def _local_and_axes(
    tensor: Tensor,
) -> tuple[Tensor, tuple[object, ...], list[torch.distributed.ProcessGroup]]:
    if not isinstance(tensor, DTensor):
        return tensor, (), []
    mesh = tensor.device_mesh
    sharded = [i for i, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    axes = [mesh.get_group(i) for i in sharded if mesh.size(i) > 1]
    return local_tensor(tensor), (id(mesh), *sharded), axes


@torch.no_grad()
def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part, which aliases the tensor; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def unique_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter once, under its first name: a tied head is its embedding."""
    yield from model.named_parameters(remove_duplicate=True)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a shared parameter to its first one."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return ties
