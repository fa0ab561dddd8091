"""Parallel layout of a family, as data that the trainer reads."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which modules are cut how. Names are dotted module paths; `*` stands for one component."""

    blocks: str
    """The repeated blocks: units of sharding, activation checkpointing and compilation."""
    colwise: tuple[str, ...]
    """Linears of a block split along their output features."""
    rowwise: tuple[str, ...]
    """Linears of a block split along their input features."""
    embedding: str
    """The token embedding."""
    head: str
    """The output head."""
