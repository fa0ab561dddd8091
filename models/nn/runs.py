"""Where every sequence starts and ends: segments as the cumulative lengths of varlen kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.nn.segments import Segments

# The kernels' tile: a maximum rounded up to it costs nothing, and compiled blocks see few values.
# It is never 1 either: with sequences without queries, flash-attn 2 then fails
# (https://github.com/Dao-AILab/flash-attention/issues/1537).
TILE = 128


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The rows of a batch, laid end to end, as sequences: each (row, segment) is one.

    A causal mask is aligned bottom-right: the last query of a sequence sees its last key. Every
    token is in exactly one sequence. Padding is a sequence of its own. Keys that no query sees
    (unfilled or later cache slots) are one without queries; queries without keys, one without keys.
    """

    cu_query: Tensor
    """(R + 1,) where each sequence starts among the B * T queries (int32)."""
    cu_key: Tensor
    """(R + 1,) where each sequence starts among the B * S keys (int32)."""
    max_query: int
    """No sequence has more queries; a multiple of TILE."""
    max_key: int
    """No sequence has more keys; a multiple of TILE."""
    causal: bool


@dataclass(frozen=True, kw_only=True)
class Side:
    """The runs of equal segments among queries or keys, in order."""

    codes: Tensor
    """(R,) row, segment, and whether these keys come after the last query, in one int64."""
    counts: Tensor
    """(R,) tokens of each run."""


def runs_of(segments: Segments) -> Runs:
    """Return the sequences of `segments`; ValueError where varlen kernels cannot express them.

    They can where a segment's tokens are contiguous in their row, queries and keys have their
    common segments in the same order, and causal queries are the last keys of their segment up to
    the last query's slot. Unlike under a dense mask, padding in two parts of a row does not see the
    other part, and padded queries of a cross mask get zeros: nothing ever reads them.
    """
    query = side_of(segments.query)
    if segments.is_self:
        return _checked(query.counts, query.counts, segments.causal, are_contiguous(query), None)
    key = side_of(segments.key, after=segments.slots[-1] if segments.causal else None)
    find = _homes_by_slot if segments.causal else _homes_by_segment
    homes, has_keys, is_aligned = find(segments, query, key)
    # A run without keys follows the one before it: queries and keys both stay in order.
    before = torch.where(has_keys, homes, -1).cummax(0).values
    is_ordered = homes[1:] > before[:-1]
    counts_query, counts_key = _merged(query, key, homes, has_keys, before)
    return _checked(
        counts_query,
        counts_key,
        segments.causal,
        are_contiguous(query) & are_contiguous(key),
        (is_ordered | ~has_keys[1:]).all() & is_aligned,
    )


def pack(x_BNTH: Tensor) -> Tensor:
    """Lay the rows end to end: (B * T, N, H), as varlen kernels take them."""
    return x_BNTH.transpose(1, 2).flatten(0, 1)


def unpack(x_XNH: Tensor, batch: int) -> Tensor:
    """Undo `pack`."""
    return x_XNH.unflatten(0, (batch, -1)).transpose(1, 2)


def check_half(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError where the kernels of back-end `name` do not compute in `dtype`."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attn_implementation={name!r} got {dtype} and computes in bfloat16 or float16 only; "
            "set the precision to bf16, or attn_implementation to sdpa or flex"
        )


def side_of(segment_BT: Tensor, after: Tensor | None = None) -> Side:
    """Return the runs of (B, T) segments; those of keys are cut at slot `after`, too."""
    rows = torch.arange(len(segment_BT), device=segment_BT.device)[:, None]
    codes_BT = (rows << 32) + ((segment_BT.long() + 1) << 1)
    if after is not None:
        codes_BT = codes_BT + (torch.arange(codes_BT.shape[1], device=rows.device) > after)
    # sync: the number of runs
    codes, counts = torch.unique_consecutive(codes_BT.flatten(), return_counts=True)
    return Side(codes=codes, counts=counts)


def is_read(codes: Tensor) -> Tensor:
    """Whether these runs are real tokens: not padding, unfilled, or after the last query."""
    return ((codes & 0xFFFFFFFF) > 2) & (codes & 1 == 0)


def are_contiguous(side: Side) -> Tensor:
    """Return whether the tokens of each segment stand together: a boolean on the device."""
    unread = -1 - torch.arange(len(side.codes), device=side.codes.device)  # all different
    return (torch.where(is_read(side.codes), side.codes, unread).sort().values.diff() != 0).all()


def _homes_by_segment(
    segments: Segments, query: Side, key: Side
) -> tuple[Tensor, Tensor, Tensor | bool]:
    """Return the run of keys of each run of queries, whether it has one, and whether all fit."""
    codes, order = key.codes.sort()
    places = torch.searchsorted(codes, query.codes).clamp(max=len(codes) - 1)
    return order[places], (codes[places] == query.codes) & is_read(query.codes), True


def _homes_by_slot(
    segments: Segments, query: Side, key: Side
) -> tuple[Tensor, Tensor, Tensor | bool]:
    """Return the same, where each query is the key at its slot."""
    length, width = segments.query.shape[1], segments.key.shape[1]
    last = query.counts.cumsum(0) - 1
    slots = last // length * width + segments.slots[last % length]
    ends = key.counts.cumsum(0) - 1
    homes = torch.searchsorted(ends, slots).clamp(max=len(ends) - 1)
    has_keys = key.codes[homes] == query.codes
    _, is_elsewhere, _ = _homes_by_segment(segments, query, key)
    is_aligned = torch.where(has_keys, ends[homes] == slots, ~is_elsewhere).all()
    return homes, has_keys, is_aligned & (segments.slots.diff() == 1).all()


def _merged(
    query: Side, key: Side, homes: Tensor, has_keys: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the lengths in queries and in keys of all sequences, those without keys included."""
    counts = torch.zeros_like(key.counts).index_add_(0, homes, query.counts * has_keys)
    keyless = query.counts[~has_keys]  # sync: their number
    places = torch.arange(len(counts), device=counts.device) * 2
    order = torch.cat((places, before[~has_keys] * 2 + 1)).argsort(stable=True)
    counts_key = torch.cat((key.counts, torch.zeros_like(keyless)))
    return torch.cat((counts, keyless))[order], counts_key[order]


def _checked(
    counts_query: Tensor,
    counts_key: Tensor,
    causal: bool,
    is_contiguous: Tensor,
    is_fitting: Tensor | None,
) -> Runs:
    facts = (is_contiguous, is_contiguous if is_fitting is None else is_fitting)
    numbers = torch.stack((*facts, counts_query.max(), counts_key.max())).tolist()  # sync: once
    remedy = "; keep each segment's tokens together, or set attn_implementation to sdpa or flex"
    if not numbers[0]:
        raise ValueError(
            "a segment is not contiguous in its row, and varlen kernels need that" + remedy
        )
    if not numbers[1]:
        raise ValueError(
            "queries and keys of a row have their segments in different places, and varlen kernels "
            "need the same order, and causal queries last in their segment" + remedy
        )
    max_query, max_key = (-(-int(number) // TILE) * TILE for number in numbers[2:])
    return Runs(
        cu_query=_starts(counts_query),
        cu_key=_starts(counts_key),
        max_query=max_query,
        max_key=max_key,
        causal=causal,
    )


def _starts(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
