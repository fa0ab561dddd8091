"""Parallel layout of a family, as data that the trainer reads."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which modules are cut how. Names are dotted module paths; `*` stands for one component."""

    blocks: tuple[str, ...]
    """The repeated blocks, `a.b.*`: units of sharding, activation checkpointing, compilation."""
    colwise: tuple[str, ...]
    """Linears of a block split along their output features; attention's by heads (`HeadRows`)."""
    rowwise: tuple[str, ...]
    """Linears of a block split along their input features."""
    replicated: tuple[str, ...] = ()
    """Modules that every tensor-parallel rank computes as a whole: a vision tower."""
    positions: tuple[str, ...] = ()
    """Modules outside the blocks that map (B, T) ids to the stream, beside `embedding`."""
    embedding: str
    """The token embedding."""
    norm: str = ""
    """The norm behind the last block; empty where no split of the model is known."""


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """How the output features of a projection belong to heads.

    A module with projections by head says it in `head_rows: dict[str, HeadRows]`.
    """

    unit: int
    """Features of one head, in a row; heads follow each other."""
    shared: int = 0
    """Features after those of all heads, which all heads use."""
