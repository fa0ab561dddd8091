"""Modules that compute a rank's share of what a whole one computes."""

import torch
from torch import Tensor, nn

from trainer.parallel.collectives import own_tokens


def cut_inputs(positions: nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Let a table of positions look up this rank's tokens only, in place."""
    lookup = positions.forward

    def forward(ids_BT: Tensor) -> Tensor:
        result: Tensor = lookup(own_tokens(ids_BT, group))
        return result

    positions.forward = forward
