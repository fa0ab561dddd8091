"""Where an optimizer works: what it has to know beside the weights."""

from dataclasses import dataclass

import torch

from trainer.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run around an optimizer."""

    seed: int = 0
    """Of stochastic rounding."""
    compute: torch.dtype = torch.float32
    """What matrices are multiplied in."""
    mesh: Mesh | None = None
    """Who holds the other pieces of a matrix; None: all of it is here."""


ALONE = Place()
"""One process."""
