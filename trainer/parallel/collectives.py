"""Collectives with gradients, as tensor and context parallelism need them.

Each forward has the one backward that is right for it: the conjugate pairs of Shoeybi et al. 2019
(f and g) and Korthikanti et al. 2022 (g and its transpose over the sequence).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

Group = dist.ProcessGroup
# torch 2.13 renamed both, and warns of the names that 2.11 has.
_ALL_GATHER = getattr(functional, "all_gather_single", functional.all_gather_tensor)
_REDUCE_SCATTER = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)
TOKENS = 1  # the dimension of a (B, T, ..) tensor that tokens lie along


def copied(x: Tensor, group: Group) -> Tensor:
    """Return `x`, equal on all ranks; each uses it for its own share, so gradients add up."""
    result: Tensor = _Copied.apply(x, group)
    return result


def summed(x: Tensor, group: Group) -> Tensor:
    """Return the sum of the ranks' `x`; all go on alike, so each has the whole gradient."""
    result: Tensor = _Summed.apply(x, group)
    return result


def gathered(x: Tensor, group: Group, *, is_used_whole: bool = False) -> Tensor:
    """Return the ranks' tokens, end to end; each rank uses them for its own share.

    With `is_used_whole` every rank computes the same from them: a token's gradient is the same on
    all ranks, and is not added up.
    """
    function = _GatheredAlike if is_used_whole else _Gathered
    result: Tensor = function.apply(x, group)
    return result


def scattered_sum(x: Tensor, group: Group) -> Tensor:
    """Return this rank's tokens of the sum of the ranks' `x`."""
    result: Tensor = _ScatteredSum.apply(x, group)
    return result


def exchanged(x: Tensor, group: Group, give: int, take: int) -> Tensor:
    """Return this rank's share of dimension `give`, of all ranks' `x` end to end along `take`."""
    result: Tensor = _Exchanged.apply(x, group, give, take)
    return result


def own_tokens(x: Tensor, group: Group) -> Tensor:
    """Return this rank's tokens of `x`, for what has no gradient."""
    return x.chunk(group.size(), TOKENS)[group.rank()]


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _GatheredAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_tokens(grad, ctx.group).contiguous(), None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, give: int, take: int) -> Tensor:
        ctx.way_back = group, take, give
        return _all_to_all(x, group, give, take)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.way_back), None, None, None


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def _all_gather(x: Tensor, group: Group) -> Tensor:
    return stacked(x, group).movedim(0, TOKENS).flatten(TOKENS, TOKENS + 1)


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    parts = x.unflatten(TOKENS, (group.size(), -1)).movedim(TOKENS, 0).contiguous()
    own = _REDUCE_SCATTER(parts.flatten(0, 1), "sum", 0, group)
    return functional.wait_tensor(own)


def _all_to_all(x: Tensor, group: Group, give: int, take: int) -> Tensor:
    sent = torch.stack(x.chunk(group.size(), give))
    received = functional.wait_tensor(functional.all_to_all_single(sent, None, None, group))
    return torch.cat(received.unbind(), take)


def stacked(x: Tensor, group: Group) -> Tensor:
    """Return (ranks, *x.shape), every rank's `x`, without gradients."""
    parts = functional.wait_tensor(_ALL_GATHER(x.detach().contiguous(), 0, group))
    return parts.view(group.size(), *x.shape)
