"""Modules that compute a rank's share of what a whole one computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.parallel.collectives import own_tokens


class RowwiseLinear(nn.Linear):
    """A linear over this rank's share of its input features; the bias is added once."""

    def __init__(
        self, linear: nn.Linear, in_features: int, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        total = self.reduce(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias


def cut_inputs(positions: nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Let a table of positions look up this rank's tokens only, in place."""
    lookup = positions.forward

    def forward(ids_BT: Tensor) -> Tensor:
        result: Tensor = lookup(own_tokens(ids_BT, group))
        return result

    positions.forward = forward
