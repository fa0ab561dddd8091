"""Parallel layout of a family, as data that the trainer reads."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """What is computed for each image, and for each token that looks at one: what FLOPs count.

    Patterns name weights, or the attention modules of `scores`; `*` matches anything, and the first
    pattern that fits decides.
    """

    rows: dict[str, int] = field(default_factory=dict)
    """How many vectors of one image meet a weight."""
    scores: dict[str, int] = field(default_factory=dict)
    """Width x queries x keys of one image in a module with attention."""
    onlooker_weights: tuple[str, ...] = ()
    """Weights that meet tokens which look at an image, and no others."""
    onlooker_scores: dict[str, int] = field(default_factory=dict)
    """Width x keys of one such token in a module with cross-attention."""


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
    image_work: ImageWork = ImageWork()
    """Of a model that looks at images."""


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """How the output features of a projection belong to heads.

    A module with projections by head says it in `head_rows: dict[str, HeadRows]`.
    """

    unit: int
    """Features of one head, in a row; heads follow each other."""
    shared: int = 0
    """Features after those of all heads, which all heads use."""
    parts: int = 1
    """Projections that lie side by side in one head's features: query, key and value."""
    shared_parts: int = 1
    """Projections that lie one after the other in the shared features."""
