"""Attention by products of matrices: each block of queries with the keys that it sees.

Documents of one length come as (documents, heads, length, H). Keys of fewer heads are not repeated:
the queries of a group of heads stand one behind the other.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64  # queries of one product
BLOCK_BYTES = 1 << 22  # scores at once: they stay in the cache


def blocked_mixture(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the mixture, and (documents, heads, length) logs of the sums of exponentials.

    Scores and their softmax are in at least fp32; weights are rounded to the inputs' dtype.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = _by_group(query, key).to(wide) * scale
    keys, values = _turned(_by_head(key).to(wide)), _by_head(value)
    mixed = torch.empty_like(queries, dtype=query.dtype)
    log_sums = queries.new_empty(queries.shape[:3])
    for some, rows, seen in _blocks(queries, causal):
        block = queries[some, :, rows]
        scores = block.flatten(1, 2) @ keys[some, :, :seen]
        if causal:
            _hide(scores, block)
        weights = scores.softmax(-1)
        # The largest weight is 1 / sum of exp(score - largest score).
        log_sum = scores.amax(-1) - weights.amax(-1).log()
        log_sums[some, :, rows] = log_sum.view(block.shape[:3])
        mixed[some, :, rows] = (weights.to(value.dtype) @ values[some, :seen]).view_as(block)
    return mixed.view_as(query), log_sums.view(query.shape[:3])


def blocked_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sums: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Scores are rounded to the inputs' dtype, which is finest near 0: they are shifted by what a
    softmax does not see, to between the mean weight and the whole (half the log of their number
    below the log of their sum). Else large scores would lose what makes them differ.
    """
    queries, gradients = _by_group(query, key), _by_group(gradient, key)
    keys, values = _by_head(key), _by_head(value)
    turned_keys, turned_values = _turned(keys), _turned(values)
    shifts = log_sums.contiguous().view(queries.shape[:3]).neg()
    query_grads = torch.empty_like(queries)
    key_grads, value_grads = torch.zeros_like(keys), torch.zeros_like(values)
    for some, rows, seen in _blocks(queries, causal):
        block = queries[some, :, rows]
        own, own_gradient = (x[some, :, rows].flatten(1, 2) for x in (queries, gradients))
        shift = shifts[some, :, rows] + _half_log(rows, seen, causal)
        scores = shift.to(query.dtype).flatten(1)[..., None].repeat(1, 1, seen)
        if causal:
            _hide(scores, block)
        weights = scores.baddbmm_(own, turned_keys[some, :, :seen], alpha=scale).softmax(-1)
        value_grads[some, :seen].baddbmm_(weights.transpose(1, 2), own_gradient)
        weights_grad = own_gradient @ turned_values[some, :, :seen]
        scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
        torch.mul(
            (scores_grad @ keys[some, :seen]).view_as(block), scale, out=query_grads[some, :, rows]
        )
        key_grads[some, :seen].baddbmm_(scores_grad.transpose(1, 2), own, alpha=scale)
    return query_grads.view_as(query), key_grads.view_as(key), value_grads.view_as(value)


def _by_group(x_DNLH: Tensor, key_DKLH: Tensor) -> Tensor:
    """Return (documents x key heads, queries of the group, length, H)."""
    groups = x_DNLH.shape[1] // key_DKLH.shape[1]
    return x_DNLH.contiguous().view(-1, groups, *x_DNLH.shape[2:])


def _by_head(x_DKLH: Tensor) -> Tensor:
    """Return (documents x key heads, length, H)."""
    return x_DKLH.contiguous().view(-1, *x_DKLH.shape[2:])


def _turned(x_XLH: Tensor) -> Tensor:
    """Return (.., H, length) in this order in memory, as products are fastest with."""
    return x_XLH.transpose(1, 2).contiguous()


def _blocks(queries_XGLH: Tensor, causal: bool) -> Iterator[tuple[slice, slice, int]]:
    """Yield which key heads, which of their queries, and how many keys these see."""
    count, groups, length, _ = queries_XGLH.shape
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = stop if causal else length
        size = groups * (stop - start) * seen * queries_XGLH.element_size()
        step = max(1, BLOCK_BYTES // size)
        for first in range(0, count, step):
            yield slice(first, first + step), slice(start, stop), seen


def _hide(scores: Tensor, block_XGQH: Tensor) -> None:
    """Add -inf to the scores of a block's queries with the keys behind them, the last ones."""
    size = block_XGQH.shape[2]
    own = scores.unflatten(1, block_XGQH.shape[1:3])[..., -size:]
    own += scores.new_full((size, size), -math.inf).triu_(1)


def _half_log(rows: slice, seen: int, causal: bool) -> Tensor:
    """Return half the log of how many keys each query sees."""
    size = rows.stop - rows.start
    counts = torch.arange(rows.start + 1, rows.stop + 1) if causal else torch.full((size,), seen)
    return counts.log() / 2
