"""One order of additions for every number of data ranks: the same bits on 1, 2 and 4 of them.

The micro-batches of a step are the leaves of a binary tree. Rank r of w, a power of two, computes
leaf t * w + r in round t; ranks add their w neighbours pairwise, and a binary counter adds up the
rounds. Which rank computed what leaves no trace in the sum.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.pieces import Piece


class TreeSum:
    """Adds up what is pushed, pairwise: a stack of subtrees, the largest at the bottom."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, list[Tensor]]] = []

    def push(self, tensors: list[Tensor]) -> None:
        """Add the next leaf, or subtree of as many leaves as the others; takes the tensors over."""
        level = 0
        while self._stack and self._stack[-1][0] == level:
            tensors = _added(self._stack.pop()[1], tensors)
            level += 1
        self._stack.append((level, tensors))

    def total(self) -> list[Tensor]:
        """Return the sum, and forget it."""
        _, total = self._stack.pop()
        while self._stack:
            total = _added(self._stack.pop()[1], total)
        return total


def _added(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def summed_share(flat_X: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's share of the pairwise sum of the ranks' tensors; X divides by them.

    All-to-all carries bits and adds none, whatever the backend. Collective.
    """
    if group.size() == 1:
        return flat_X
    received_X = torch.empty_like(flat_X)
    dist.all_to_all_single(received_X, flat_X, group=group)
    return pairwise_sum(received_X.view(group.size(), -1))


def pairwise_sum(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, by halves; zeros behind the others round nothing."""
    while len(parts) > 1:
        if len(parts) % 2:
            parts = torch.cat((parts, torch.zeros_like(parts[:1])))
        parts = parts[0::2] + parts[1::2]
    return parts[0]


class _PairwiseReduceScatter:
    """FSDP2's interface for a reduce-scatter of one's own."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(summed_share(input_tensor, group))


def reduce_pairwise(model: nn.Module) -> None:
    """Let every FSDP2 unit of `model` add gradients pairwise, and divide them by nothing."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_PairwiseReduceScatter())  # type: ignore[arg-type]
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def row_square_sum(
    gradients: Iterable[tuple[Piece, Tensor]],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Tensor:
    """Return the sum of squares over the whole tensors, added up row by row in their order.

    As `global_square_sum`, which adds in the order of the shards. Collective over `group`.
    """
    rows = []
    for piece, gradient in gradients:
        whole = torch.zeros(piece.num_rows, dtype=torch.float64, device=device)
        matrix = gradient.reshape(-1, piece.width)
        squares = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64).square()
        first = 0
        for run in piece.rows:
            if run.is_own:
                whole[run.start : run.stop] = squares[first : first + len(run)]
            first += len(run)
        rows.append(whole)
    total = torch.cat(rows)
    if group is not None:
        dist.all_reduce(total, group=group)  # one rank has each row: adding zeros rounds nothing
    return total.sum()
