"""Attention document by document on a CPU, as one operation with its gradient.

torch's kernel (Dao 2023, flash-attention) gives the result. It gives the gradients too, but those
of documents of up to 1,024 tokens in bfloat16: there it takes 1.5 (512 tokens) to 3 times (128
tokens) as long as products of matrices over blocks of queries.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.nn.documents import Documents, Layout

_aten = torch.ops.aten
_flash = _aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
BLOCK = 64  # queries of one product
MAX_BLOCKED = 1024  # tokens; torch's kernel skips what a causal mask hides from 512 on
BLOCK_BYTES = 1 << 22  # scores at once: they stay in the cache


def attend(
    query_BNTH: Tensor, key_BKTH: Tensor, value_BKTH: Tensor, documents: Documents, scale: float
) -> Tensor:
    """Return the (B, N, T, H) mixture of values, 0 for padding; K divides N."""
    mixed_BNTH, _ = document_attention(
        query_BNTH, key_BKTH, value_BKTH,
        documents.tokens, documents.places, documents.sizes, documents.causal, scale,
    )  # fmt: skip
    return mixed_BNTH


# Registered when this file is read: compiled code finds an operation by its name.
@torch.library.custom_op("tessera::document_attention", mutates_args=(), device_types="cpu")
def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    places: Tensor,
    sizes: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the mixture, and the (B, N, T) log of the sum of each query's exponentials."""
    layout = Layout.of(tokens, places, sizes, rows=len(query), causal=causal)
    inputs = zip(*map(layout.apart, (query, key, value)), strict=True)
    found = [_flash(*each, 0.0, causal, scale=scale) for each in inputs]
    log_sums = query.new_empty(query.shape[:3], dtype=_wide(query))
    return (
        layout.together([mixed for mixed, _ in found], query),
        layout.together([log_sum for _, log_sum in found], log_sums),
    )


@torch.library.custom_op(
    "tessera::document_attention_backward", mutates_args=(), device_types="cpu"
)
def document_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    log_sums: Tensor,
    tokens: Tensor,
    places: Tensor,
    sizes: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    layout = Layout.of(tokens, places, sizes, rows=len(query), causal=causal)
    inputs = zip(
        layout.apart(gradient, is_gradient=True),
        *map(layout.apart, (query, key, value, mixed, log_sums[..., None])),
        strict=True,
    )
    found = [_gradients(each, causal, scale) for each in inputs]
    parts = zip(*found, strict=True) if found else ([], [], [])
    both = zip(parts, (query, key, value), strict=True)
    query_grad, key_grad, value_grad = (layout.together(list(x), like) for x, like in both)
    return query_grad, key_grad, value_grad


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads_side_by_side(x_BNTH: Tensor) -> Tensor:
    return torch.empty_like(x_BNTH.transpose(1, 2), memory_format=torch.contiguous_format)


@document_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mixed = _heads_side_by_side(query)
    log_sums = mixed.new_empty(mixed.shape[:3], dtype=_wide(query))
    return mixed.transpose(1, 2), log_sums.transpose(1, 2)


@document_attention_backward.register_fake
def _(_gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_heads_side_by_side(x).transpose(1, 2) for x in inputs[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = document_attention_backward(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *found, None, None, None, None, None


document_attention.register_autograd(_backward, setup_context=_keep)
OPERATION = torch.ops.tessera.document_attention.default
"""As those who watch operations see it."""


def _gradients(
    inputs: tuple[Tensor, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of documents of one length, in (documents, heads, length, H)."""
    gradient, query, key, value, mixed, log_sums = inputs
    log_sums = log_sums.squeeze(-1)
    if query.dtype == torch.bfloat16 and query.shape[2] <= MAX_BLOCKED:
        return blocked_gradients(gradient, query, key, value, log_sums, causal, scale)
    found: tuple[Tensor, Tensor, Tensor] = _flash_backward(
        gradient, query, key, value, mixed, log_sums, 0.0, causal, scale=scale
    )
    return found


def blocked_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sums: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by products of matrices: each block of queries with the keys it sees.

    Scores are rounded to the inputs' dtype, which is finest near 0: they are shifted by what a
    softmax does not see, to between the mean weight and the whole (half the log of their number
    below the log of their sum). Else large scores would lose what makes them differ.
    """
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    length = query.shape[2]
    # (documents x key heads, queries of the group, length, H): keys need not be repeated.
    queries, gradients = (
        x.contiguous().view(-1, num_heads // num_key_heads, length, x.shape[-1])
        for x in (query, gradient)
    )
    keys, values = (x.contiguous().view(-1, length, x.shape[-1]) for x in (key, value))
    shifts = log_sums.contiguous().view(queries.shape[:3]).neg()
    grads = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = stop if causal else length
        mask = _hidden(stop - start, query) if causal else None
        size = queries.shape[1] * (stop - start) * seen * query.element_size()
        step = max(1, BLOCK_BYTES // size)
        for first in range(0, len(queries), step):
            some = slice(first, first + step)
            _add_block(
                (queries[some, :, start:stop], gradients[some, :, start:stop]),
                (keys[some, :seen], values[some, :seen]),
                shifts[some, :, start:stop] + _half_log(start, stop, seen, causal),
                mask, scale,
                (grads[0][some, :, start:stop], grads[1][some, :seen], grads[2][some, :seen]),
            )  # fmt: skip
    return grads[0].view_as(query), grads[1].view(key.shape), grads[2].view(value.shape)


def _hidden(size: int, like: Tensor) -> Tensor:
    """Return what is added to scores of (queries, their own tokens)."""
    return like.new_full((size, size), -math.inf).triu_(1)


def _half_log(start: int, stop: int, seen: int, causal: bool) -> Tensor:
    """Return half the log of how many keys each query sees."""
    counts = torch.arange(start + 1, stop + 1) if causal else torch.full((stop - start,), seen)
    return counts.log() / 2


def _add_block(
    of_queries: tuple[Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    shifts: Tensor,
    mask: Tensor | None,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradient of a block of queries, and add to those of the keys and values it sees."""
    query, gradient = (x.flatten(1, 2) for x in of_queries)
    key, value = of_keys
    scores = shifts.to(query.dtype).flatten(1)[..., None].repeat(1, 1, key.shape[1])
    if mask is not None:
        own = scores.unflatten(1, shifts.shape[1:])[..., -len(mask) :]
        own += mask
    weights = scores.baddbmm_(query, key.transpose(1, 2), alpha=scale).softmax(-1)
    query_grad, key_grad, value_grad = grads
    value_grad.baddbmm_(weights.transpose(1, 2), gradient)
    weights_grad = gradient @ value.transpose(1, 2)
    scores_grad = _aten._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
    torch.mul((scores_grad @ key).view(query_grad.shape), scale, out=query_grad)
    key_grad.baddbmm_(scores_grad.transpose(1, 2), query, alpha=scale)


def _flops(query: Tensor, sizes: Tensor, causal: bool, places: Tensor) -> int:
    """Return what one product of all queries with the keys of their documents computes.

    As torch counts it: a causal mask makes it no less, padding of documents no more than the kernel
    computes.
    """
    layout = Layout.of(places, places, sizes, rows=len(query), causal=causal)
    pairs = sum(count * length * length for count, length in layout.groups)
    return 2 * pairs * query.shape[1] * query.shape[3]


@register_flop_formula(torch.ops.tessera.document_attention, get_raw=True)
def _forward_flops(
    query: Tensor, key: Any, value: Any, tokens: Any, places: Tensor, sizes: Tensor,
    causal: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * _flops(query, sizes, causal, places)


@register_flop_formula(torch.ops.tessera.document_attention_backward, get_raw=True)
def _backward_flops(
    gradient: Any, query: Tensor, key: Any, value: Any, mixed: Any, log_sums: Any, tokens: Any,
    places: Tensor, sizes: Tensor, causal: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 5 * _flops(query, sizes, causal, places)
