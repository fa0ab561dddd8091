"""Who may look at whom: attention inside segments, for packed, padded, cached and cross rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

UNFILLED = -1  # segment of a cache slot that holds nothing yet: no query ever matches it


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A query may look at the keys of its own segment; if causal, at none that come later.

    Segment 0 is padding: it sees padding only, so that no real token ever sees it. What a padded
    query gets is finite, nothing reads it, and back-ends differ in it: a mixture of padding, or
    zeros. Any other query without a key of its segment gets zeros from every back-end.
    """

    query: Tensor
    """(B, T) segment of each query."""
    key: Tensor
    """(B, S) segment of each key."""
    causal: bool
    slots: Tensor
    """(T,) index of each query among the keys (int64); read where causal."""

    @staticmethod
    def within(segment_ids_BT: Tensor, *, causal: bool = True) -> "Segments":
        """Return the segments of self-attention without a cache."""
        slots_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
        return Segments(query=segment_ids_BT, key=segment_ids_BT, causal=causal, slots=slots_T)

    @property
    def is_self(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query is self.key


def has_values_here(x: Tensor) -> bool:
    """Whether it has values (a fake tensor has none), and they can be read without waiting."""
    return x.is_cpu and type(x) is Tensor


def dense_mask(segments: Segments) -> Tensor:
    """Return the (B, 1, T, S) boolean mask: may query t look at key s?"""
    mask_BTS = segments.query[:, :, None] == segments.key[:, None, :]
    if segments.causal:
        keys_S = torch.arange(segments.key.shape[1], device=segments.key.device)
        mask_BTS = mask_BTS & (keys_S <= segments.slots[:, None])
    return mask_BTS[:, None]
