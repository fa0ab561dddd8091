"""Attention document by document on a CPU, as one operation with its gradient.

torch's kernel (Dao 2023, flash-attention) gives results and gradients, but where products of
matrices over blocks of queries are faster.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.nn.blocked_attention import blocked_gradients, blocked_mixture
from models.nn.documents import Documents, Layout
from models.nn.segments import has_values_here

_aten = torch.ops.aten
_flash = _aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Tokens of documents for which products are faster, in bfloat16 alone. torch's kernel takes 512
# keys at once, what a causal mask hides of them too; of fewer tokens that is little.
MIXED_BY_PRODUCTS = range(257, 513)
GRADIENTS_BY_PRODUCTS = range(257, 1025)  # 1.5 times as fast (512 tokens)
# Of shorter ones torch's kernel takes 2 to 4 times as long as in float32. Products would need a
# compiled kernel for each number of documents: other ones in each step push them out of the cache.
GRADIENTS_IN_FLOAT32 = range(1, 257)


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
    found = [_mixture(each, causal, scale) for each in inputs]
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


def _mixture(inputs: tuple[Tensor, ...], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the mixture of documents of one length, in (documents, heads, length, H), and its
    (documents, heads, length) log_sums."""
    query, key, value = inputs
    if causal and query.dtype == torch.bfloat16 and query.shape[2] in MIXED_BY_PRODUCTS:
        return blocked_mixture(query, key, value, causal, scale)
    mixed, log_sums = _flash(query, key, value, 0.0, causal, scale=scale)
    return mixed, log_sums


def _gradients(
    inputs: tuple[Tensor, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of documents of one length, in (documents, heads, length, H)."""
    gradient, query, key, value, mixed, log_sums = inputs
    log_sums = log_sums.squeeze(-1)
    if query.dtype == torch.bfloat16 and query.shape[2] in GRADIENTS_BY_PRODUCTS:
        return blocked_gradients(gradient, query, key, value, log_sums, causal, scale)
    is_widened = query.dtype == torch.bfloat16 and query.shape[2] in GRADIENTS_IN_FLOAT32
    dtype = torch.float32 if is_widened else query.dtype
    tensors = (x.to(dtype) for x in (gradient, query, key, value, mixed))
    found = _flash_backward(*tensors, log_sums, 0.0, causal, scale=scale)
    query_grad, key_grad, value_grad = (x.to(query.dtype) for x in found)
    return query_grad, key_grad, value_grad


def _flops(query: Tensor, sizes: Tensor, causal: bool, places: Tensor) -> int:
    """Return what one product of all queries with the keys of their documents computes.

    As torch counts it: a causal mask makes it no less, padding of documents no more than the kernel
    computes. Where documents have no values, as for a compiler, each row is one.
    """
    if not has_values_here(sizes):
        return 2 * len(places) * query.shape[2] * query.shape[1] * query.shape[3]
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
