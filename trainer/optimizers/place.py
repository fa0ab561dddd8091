"""Where an optimizer works, and on what: all it has to know beside its settings."""

from dataclasses import dataclass

import torch
from torch import nn

from models.layout import Layout
from trainer.mesh import Mesh
from trainer.optimizers.rules import Rules


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run around an optimizer."""

    seed: int = 0
    """Of stochastic rounding."""
    compute: torch.dtype = torch.float32
    """What matrices are multiplied in."""
    mesh: Mesh | None = None
    """Who holds the other pieces of a matrix; None: all of it is here."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an optimizer is to do, as far as it is known before anything is built."""

    model: nn.Module
    """Planned."""
    layout: Layout
    axes: dict[str, int]
    """Lengths of the mesh's axes."""
    rules: Rules
    owns_update: bool
    """Whether the engine leaves the update to us."""
    is_offloaded: bool
    """Whether it is done on the host."""


ALONE = Place()
"""One process."""
