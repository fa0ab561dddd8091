"""Which piece of each parameter this rank holds, and sums over all pieces of a tensor."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.pieces import Piece, Rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Splits = Mapping[str, Piece]
"""Which part of each parameter this rank's module holds, where that is not all of it."""
_NO_SPLITS: Splits = {}


def piece_of(tensor: Tensor, split: Piece | None = None) -> Piece:
    """Return this rank's piece of a parameter: cut over tensor-parallel ranks, then by FSDP2.

    `split` is what the module holds of it (with any `local`); None: all of it.
    """
    base = split or Piece.of(tensor)
    if not is_dtensor(tensor):
        return base.like(tensor.detach())
    return narrowed(base, local_tensor(tensor), *_row_range(tensor))


def narrowed(base: Piece, local: Tensor, first: int, last: int) -> Piece:
    """Return rows [first, last) of those that `base` holds, in order; `local` are their values."""
    rows = tuple(_intersect(base.rows, first, last)) or (Rows(start=0, stop=0),)
    return replace(base, local=local, rows=rows)


def _row_range(tensor: "DTensor") -> tuple[int, int]:
    """Return which rows of the (tensor-parallel part of the) tensor this rank's shard holds."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in tensor.placements:
        if isinstance(placement, Shard) and placement.dim != 0:
            raise AssertionError(f"FSDP2 sharded dim {placement.dim}, not rows")
    local_shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    start = min(offset[0], tensor.shape[0])
    return start, start + local_shape[0]


def _intersect(runs: tuple[Rows, ...], first: int, last: int) -> Iterator[Rows]:
    """Yield what lies at places [first, last) of the runs laid end to end."""
    place = 0
    for rows in runs:
        start, stop = max(first - place, 0), min(last - place, len(rows))
        if start < stop:
            yield replace(rows, start=rows.start + start, stop=rows.start + stop)
        place += len(rows)


def named_pieces(
    parameters: Iterable[tuple[str, nn.Parameter]], splits: Splits = _NO_SPLITS
) -> dict[str, Piece]:
    """Return the piece of each parameter by name."""
    return {name: piece_of(parameter, splits.get(name)) for name, parameter in parameters}


@torch.no_grad()
def sum_shared(gradients: Iterable[tuple[Piece, Tensor]]) -> None:
    """Add up, in place, gradients of rows that several ranks hold and each saw a part of: local
    tensors, each with the piece that it lies as.

    Collective over every axis of the pieces' `sum_over`, in alphabetic order: one message for each.
    """
    groups: dict[str, dist.ProcessGroup] = {}
    parts: dict[str, list[Tensor]] = {}
    for piece, gradient in gradients:
        if not piece.is_shared:
            continue
        first = 0
        for rows in piece.rows:
            for axis, group in rows.sum_over:
                groups[axis] = group
                part = gradient[first : first + len(rows)] if gradient.ndim else gradient
                parts.setdefault(axis, []).append(part)
            first += len(rows)
    for axis, group in sorted(groups.items()):
        tensors = parts[axis]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, total in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(total.view(tensor.shape))


def global_square_sum(
    gradients: Iterable[tuple[Piece, Tensor]],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Return the sum of squares over the whole tensors, each element once, in at least fp32.

    Gradients are local tensors, each with the piece that it lies as. `group` holds the ranks of one
    copy of the model; None: this rank alone. Collective over it.
    """
    own = [tensor for piece, gradient in gradients for tensor in piece.split_own(gradient)]
    wide = reduce(torch.promote_types, {tensor.dtype for tensor in own}, torch.float32)
    # One call for all: one by one, the norms of 291 weights cost two milliseconds of the host.
    norms = torch._foreach_norm(own, 2, wide) if own else ()
    # fp64 on every rank, whether it has a gradient or not: they meet in one collective.
    empty = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.stack(norms).square().double().sum() if norms else empty
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part, which aliases the tensor; a plain tensor is its own part."""
    (local,) = local_tensors([tensor])
    return local


@torch.no_grad()
def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return `local_tensor` of each: to switch gradients off costs as much as to take one."""
    return [tensor.to_local() if is_dtensor(tensor) else tensor.detach() for tensor in tensors]


def is_dtensor(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether FSDP2 cut it. None is before something imported the class: 0.8 s."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


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
