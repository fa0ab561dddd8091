"""Keys and values of earlier positions: a cache that grows, and one of fixed size."""

from typing import Protocol

import torch
from torch import Tensor

from models.nn.segments import UNFILLED, Segments


class LayerCache(Protocol):
    """One layer's share of a cache."""

    def update(self, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all (B, K, S, H) ones."""
        ...


class Cache(Protocol):
    """What generation carries from one forward pass to the next."""

    image_states: Tensor | None
    """(B, I, states, E): what the text looks at, of images that an earlier pass encoded."""

    @property
    def length(self) -> int:
        """Positions stored so far."""
        ...

    def extend(self, segment_ids_BT: Tensor) -> Segments:
        """Make room for T new positions, and say whom they may look at. Once per forward pass."""
        ...

    def layer(self, index: int) -> LayerCache: ...

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows, in this order (repeats allowed): beams that go on."""
        ...


class GrowingCache:
    """Grows by concatenation."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [_GrowingLayer() for _ in range(num_layers)]
        self.segment_ids: Tensor | None = None
        self.image_states: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.segment_ids is None else self.segment_ids.shape[1]

    def extend(self, segment_ids_BT: Tensor) -> Segments:
        old = self.segment_ids
        start = 0 if old is None else old.shape[1]
        keys = segment_ids_BT if old is None else torch.cat((old, segment_ids_BT), dim=1)
        self.segment_ids = keys
        slots_T = torch.arange(start, keys.shape[1], device=keys.device)
        return Segments(query=segment_ids_BT, key=keys, causal=True, slots=slots_T)

    def layer(self, index: int) -> LayerCache:
        return self.layers[index]

    def reorder(self, rows: Tensor) -> None:
        assert self.segment_ids is not None
        self.segment_ids = self.segment_ids[rows]
        if self.image_states is not None:
            self.image_states = self.image_states[rows]
        for layer in self.layers:
            layer.reorder(rows)


class _GrowingLayer:
    """Keys and values so far; None before the first."""

    def __init__(self) -> None:
        self.stored: tuple[Tensor, Tensor] | None = None

    def update(self, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        if self.stored is None:
            self.stored = (key_BKTH, value_BKTH)
        else:
            keys, values = self.stored
            self.stored = (
                torch.cat((keys, key_BKTH), dim=2),
                torch.cat((values, value_BKTH), dim=2),
            )
        return self.stored

    def reorder(self, rows: Tensor) -> None:
        if self.stored is not None:
            self.stored = (self.stored[0][rows], self.stored[1][rows])


class StaticCache:
    """Holds `max_length` positions from the start: the same shapes at every step."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length, self.filled = max_length, 0
        self.layers = [_StaticLayer(max_length) for _ in range(num_layers)]
        self.segment_ids: Tensor | None = None
        self.image_states: Tensor | None = None

    @property
    def length(self) -> int:
        return self.filled

    def extend(self, segment_ids_BT: Tensor) -> Segments:
        """Raise ValueError where the new positions do not fit any more."""
        batch, count = segment_ids_BT.shape
        if self.filled + count > self.max_length:
            raise ValueError(
                f"{self.filled} + {count} positions do not fit a static cache of "
                f"{self.max_length}; make it longer or generate fewer tokens"
            )
        if self.segment_ids is None:
            self.segment_ids = segment_ids_BT.new_full((batch, self.max_length), UNFILLED)
        slots_T = torch.arange(self.filled, self.filled + count, device=segment_ids_BT.device)
        self.segment_ids = self.segment_ids.index_copy(1, slots_T, segment_ids_BT)
        self.filled += count
        for layer in self.layers:
            layer.slots_T = slots_T
        return Segments(query=segment_ids_BT, key=self.segment_ids, causal=True, slots=slots_T)

    def layer(self, index: int) -> LayerCache:
        return self.layers[index]

    def reorder(self, rows: Tensor) -> None:
        assert self.segment_ids is not None
        self.segment_ids = self.segment_ids[rows]
        if self.image_states is not None:
            self.image_states = self.image_states[rows]
        for layer in self.layers:
            layer.reorder(rows)


class _StaticLayer:
    """Preallocated keys and values, written at `slots_T`."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.slots_T = torch.empty(0, dtype=torch.int64)
        self.stored: tuple[Tensor, Tensor] | None = None

    def update(self, key_BKTH: Tensor, value_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        if self.stored is None:
            batch, heads, _, size = key_BKTH.shape
            shape = (batch, heads, self.max_length, size)
            self.stored = (key_BKTH.new_zeros(shape), value_BKTH.new_zeros(shape))
        for whole, new in zip(self.stored, (key_BKTH, value_BKTH), strict=True):
            whole.index_copy_(2, self.slots_T, new)
        return self.stored

    def reorder(self, rows: Tensor) -> None:
        if self.stored is not None:
            self.stored = (self.stored[0][rows], self.stored[1][rows])


def segments_for(segment_ids_BT: Tensor, cache: Cache | None) -> Segments:
    """Return whom new positions may look at: themselves, and what the cache holds."""
    return Segments.within(segment_ids_BT) if cache is None else cache.extend(segment_ids_BT)
