"""The trunk over the real tokens of a batch alone: they stand end to end in one row."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.dense import Sdpa
from models.nn.kernel_counts import counted
from models.nn.segments import has_values_here


def goes_by_document(trunk: nn.Module) -> bool:
    """Whether a long row of many documents costs a CPU no more than these in rows of their own."""
    backend = getattr(trunk, "backend", None)
    return isinstance(backend, Sdpa) and not backend.has_dropout


def without_padding(
    trunk: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return the (B, T, D) hidden states of (B, T) ids by a trunk that computes in `dtype`, 0 where
    padding stands.

    They are computed as (1, S): the real tokens, and in halves some padding. As (B, T) where that
    is no less, or where no values are at hand.
    """
    found = _end_to_end(input_ids, position_ids, segment_ids, dtype)
    if found is None:
        return trunk(input_ids, position_ids, segment_ids)
    places, text = found
    hidden_SD = trunk(*text)[0]
    whole_XD = hidden_SD.new_zeros(segment_ids.numel(), hidden_SD.shape[1])
    return whole_XD.index_copy(0, places, hidden_SD[: len(places)]).view(*segment_ids.shape, -1)


def num_computed(segment_ids: Tensor, dtype: torch.dtype) -> int:
    """Return for how many tokens, padding included, a trunk computes that leaves padding out."""
    num_real = int(segment_ids.count_nonzero())  # of a CPU's tensor: no sync
    return min(counted(max(1, num_real), dtype), segment_ids.numel())


def _end_to_end(
    input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]] | None:
    """Return which tokens are real, and their (1, S) ids, positions and segments; None: keep rows.

    Segments of different rows get different numbers.
    """
    if not has_values_here(segment_ids):
        return None
    size = num_computed(segment_ids, dtype)
    if size == segment_ids.numel():
        return None
    places = segment_ids.flatten().nonzero()[:, 0]
    rows = torch.arange(len(segment_ids))[:, None]
    numbered = segment_ids + rows * (segment_ids.amax() + 1)
    text = (input_ids, position_ids, numbered)
    return places, [F.pad(x.flatten()[places], (0, size - len(places)))[None] for x in text]
