"""Dropout where ranks compute different shares: each draws numbers of its own."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_NAMES = ("dropout", "attn_pdrop", "resid_pdrop", "p")


class OwnNumbers:
    """Between `begin` and `end`, random numbers differ by rank; outside, all ranks draw alike.

    Ranks that hold the same stream must drop the same of it, or their copies drift apart; ranks
    that hold different heads or tokens would drop the same places of each.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.open: AbstractContextManager[None] | None = None

    def begin(self, *_: Any) -> None:
        self.end()  # recomputation may have stopped in between: the state was put back by it
        # Drawn alike on all ranks, and another one at every layer.
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        # Of this rank's GPU alone: by itself torch keeps the state of every one of the machine.
        used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        self.open = torch.random.fork_rng(devices=used)
        self.open.__enter__()
        torch.manual_seed(seed + self.rank)

    def end(self, *_: Any) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None


def drops(module: nn.Module) -> bool:
    """Whether anything below `module` uses dropout."""
    return any(
        isinstance(value := getattr(part, name, 0.0), float) and value > 0.0
        for part in module.modules()
        for name in _NAMES
    )
