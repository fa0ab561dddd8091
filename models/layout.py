"""Parallel layout of a family, as data that the trainer reads."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which modules are cut how. Names are dotted module paths; `*` stands for one component."""

    blocks: tuple[str, ...]
    """The repeated blocks, `a.b.*`: units of sharding, activation checkpointing, compilation."""
    colwise: tuple[str, ...]
    """Linears of a block split along their output features."""
    rowwise: tuple[str, ...]
    """Linears of a block split along their input features."""
    special: tuple[str, ...] = ()
    """Linears of a block with a split of their own: a fused `c_attn`."""
    embedding: str
    """The token embedding."""
    head: str
    """The language-model head."""
