"""Gemma 1 in JAX: a second opinion on the numbers, and a way to use the weights there.

Plain functions over the parameter tree of Hugging Face's Flax Gemma (`models.gemma_trees` makes
it). Of the torch model only the spec is shared: forward, rotary table, softmax and norms are
written anew, so an error would have to be made twice to go unseen. No training back-end.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch.utils.dlpack
from jax import Array

from models.gemma import GemmaSpec
from models.gemma_trees import to_flax, weight_shapes

Params = dict[str, Any]
IGNORED = -100
UNFILLED = -1  # segment of a cache slot that holds nothing yet
HF_FLAX_THETA = 10_000.0
# Accelerators round matmul inputs by default; an oracle must not.
_einsum = partial(jnp.einsum, precision="highest")
_ACTIVATIONS = {
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Cache(NamedTuple):
    """Keys and values of earlier positions, in arrays of fixed size."""

    key: Array
    """(layers, B, S, K, H), before heads are repeated."""
    value: Array
    segment_ids: Array
    """(B, S); UNFILLED where nothing is stored."""
    length: Array
    """() int32: positions stored so far."""


def init_cache(spec: GemmaSpec, batch: int, max_length: int, dtype: Any = jnp.float32) -> Cache:
    """Return an empty cache of `max_length` positions."""
    heads = (spec.num_key_value_heads, spec.head_dim)
    zeros = jnp.zeros((spec.num_hidden_layers, batch, max_length, *heads), dtype)
    segment_ids = jnp.full((batch, max_length), UNFILLED, jnp.int32)
    return Cache(zeros, zeros, segment_ids, jnp.zeros((), jnp.int32))


def init_params(
    spec: GemmaSpec, key: Array, dtype: Any = jnp.float32, *, as_hf_flax: bool = False
) -> Params:
    """Return random parameters: normal of `initializer_range`, norms and biases zero.

    `as_hf_flax`: norms start at one, as they did in Hugging Face's Flax Gemma. As a norm scales by
    1 + weight, that doubles its output.
    """
    tree = to_flax({n: torch.empty(s, device="meta") for n, s in weight_shapes(spec).items()})
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    values = []
    for number, (path, leaf) in enumerate(leaves):
        shape = tuple(leaf.shape)
        if path[-1].key in ("kernel", "embedding"):
            noise = jax.random.normal(jax.random.fold_in(key, number), shape, dtype)
            values.append(noise * jnp.asarray(spec.initializer_range, dtype))
        else:
            is_one = as_hf_flax and path[-1].key == "weight"
            values.append(jnp.full(shape, float(is_one), dtype))
    params: Params = jax.tree_util.tree_unflatten(structure, values)
    return params


def to_jax(tree: dict[str, Any]) -> Params:
    """Copy a tree of torch tensors to JAX, bit for bit; fp64 needs `jax_enable_x64`."""
    copied: Params = jax.tree.map(
        lambda t: jnp.array(jnp.from_dlpack(t.detach().cpu().contiguous()), copy=True), tree
    )
    return copied


def to_torch(params: Params) -> dict[str, Any]:
    """Copy a tree of JAX arrays to torch tensors on the CPU, bit for bit."""
    cpu = jax.devices("cpu")[0]
    copied: dict[str, Any] = jax.tree.map(
        lambda a: torch.utils.dlpack.from_dlpack(jax.device_put(a, cpu)).clone(), params
    )
    return copied


def forward(
    params: Params,
    spec: GemmaSpec,
    input_ids: Array,
    position_ids: Array,
    segment_ids: Array,
    cache: Cache | None = None,
    *,
    as_hf_flax: bool = False,
) -> tuple[Array, Cache | None]:
    """Return logits (B, T, V) and the cache with these T positions in it.

    All inputs are (B, T) integers, as for the torch model: a token sees the earlier ones of its own
    segment, and 0 is padding. Positions beyond the cache are an error of the caller: under jit
    nothing can be raised. `as_hf_flax`: rotary base 10000 whatever the config says, as there.

    Raises ValueError for rotary kinds other than default.
    """
    if spec.rope_parameters.rope_type != "default":
        raise ValueError(
            f"Gemma in JAX knows rope_type=default only, found {spec.rope_parameters.rope_type}; "
            "use the torch model"
        )
    theta = HF_FLAX_THETA if as_hf_flax else spec.rope_parameters.rope_theta
    trunk = params["model"]
    embedding_VD = trunk["embed_tokens"]["embedding"]
    dtype = embedding_VD.dtype
    x_BTD = embedding_VD[input_ids] * jnp.asarray(spec.hidden_size**0.5, dtype)
    start, key_segments, stored = 0, segment_ids, None
    if cache is not None:
        start, stored = cache.length, (cache.key, cache.value)
        new = segment_ids.astype(cache.segment_ids.dtype)
        key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, new, (0, start))
    slots_T = start + jnp.arange(input_ids.shape[1])
    mask_BTS = (segment_ids[:, :, None] == key_segments[:, None, :]) & (
        jnp.arange(key_segments.shape[1]) <= slots_T[:, None]
    )
    kept = []
    for index in range(spec.num_hidden_layers):
        layer = trunk["layers"][str(index)]
        past = None if stored is None else (stored[0][index], stored[1][index])
        normal = _norm(x_BTD, layer["input_layernorm"], spec.rms_norm_eps)
        mixed, pair = _attention(
            layer["self_attn"], spec, normal, position_ids, mask_BTS, theta, past, start
        )
        x_BTD = x_BTD + mixed
        normal = _norm(x_BTD, layer["post_attention_layernorm"], spec.rms_norm_eps)
        x_BTD = x_BTD + _mlp(layer["mlp"], spec, normal)
        kept.append(pair)
    x_BTD = _norm(x_BTD, trunk["norm"], spec.rms_norm_eps)
    head_VD = embedding_VD if spec.tie_word_embeddings else params["lm_head"]["kernel"].T
    logits_BTV = _einsum("btd,vd->btv", x_BTD, head_VD)
    if cache is None:
        return logits_BTV, None
    keys, values = (jnp.stack(part) for part in zip(*kept, strict=True))
    return logits_BTV, Cache(keys, values, key_segments, start + input_ids.shape[1])


def loss(
    params: Params,
    spec: GemmaSpec,
    input_ids: Array,
    position_ids: Array,
    segment_ids: Array,
    labels: Array,
) -> Array:
    """Return the mean negative log-likelihood in nats over labels (B, T) that are not IGNORED.

    `labels[b, t]` is what position t predicts: already shifted. Zero without any label.
    """
    logits, _ = forward(params, spec, input_ids, position_ids, segment_ids)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    is_target = labels != IGNORED
    chosen = jnp.where(is_target, labels, 0)[:, :, None]
    nll_BT = -jnp.take_along_axis(log_probabilities, chosen, axis=-1)[:, :, 0]
    return jnp.where(is_target, nll_BT, 0.0).sum() / jnp.maximum(is_target.sum(), 1)


def greedy(
    params: Params, spec: GemmaSpec, input_ids: Array, attention_mask: Array, max_new_tokens: int
) -> Array:
    """Return the likeliest continuation (B, max_new_tokens) of left-padded prompts (B, T).

    One compiled step per token, over a cache; there is no stop token.
    """
    batch, length = input_ids.shape
    dtype = params["model"]["embed_tokens"]["embedding"].dtype
    cache: Cache | None = init_cache(spec, batch, length + max_new_tokens, dtype)
    step = jax.jit(forward, static_argnames=("spec",))
    segment_ids = attention_mask.astype(jnp.int32)
    position_ids = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    tokens: list[Array] = []
    while True:
        logits, cache = step(params, spec, input_ids, position_ids, segment_ids, cache)
        tokens.append(logits[:, -1].argmax(-1))
        if len(tokens) == max_new_tokens:
            return jnp.stack(tokens, axis=1)
        input_ids = tokens[-1][:, None]
        position_ids = position_ids[:, -1:] + 1
        segment_ids = jnp.ones_like(position_ids)


def _norm(x_BTD: Array, params: Params, eps: float) -> Array:
    wide = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scaled = wide / jnp.sqrt(variance + eps) * (1.0 + params["weight"].astype(wide.dtype))
    return scaled.astype(x_BTD.dtype)


def _linear(x: Array, params: Params) -> Array:
    y = _einsum("...i,io->...o", x, params["kernel"])
    return y + params["bias"] if "bias" in params else y


def _mlp(params: Params, spec: GemmaSpec, x_BTD: Array) -> Array:
    gate = _ACTIVATIONS[spec.hidden_act](_linear(x_BTD, params["gate_proj"]))
    return _linear(gate * _linear(x_BTD, params["up_proj"]), params["down_proj"])


def _attention(
    params: Params,
    spec: GemmaSpec,
    x_BTD: Array,
    position_ids: Array,
    mask_BTS: Array,
    theta: float,
    past: tuple[Array, Array] | None,
    start: Array | int,
) -> tuple[Array, tuple[Array, Array]]:
    batch, length, _ = x_BTD.shape
    query, key, value = (
        _linear(x_BTD, params[f"{name}_proj"]).reshape(batch, length, -1, spec.head_dim)
        for name in "qkv"
    )
    query, key = _rotate(query, position_ids, theta), _rotate(key, position_ids, theta)
    if past is not None:
        key = jax.lax.dynamic_update_slice(past[0], key, (0, start, 0, 0))
        value = jax.lax.dynamic_update_slice(past[1], value, (0, start, 0, 0))
    # Query heads of one group lie side by side: (B, T, K, N / K, H).
    grouped = query.reshape(batch, length, key.shape[2], -1, spec.head_dim)
    scores = _einsum("btkgh,bskh->bkgts", grouped, key) * spec.head_dim**-0.5
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x_BTD.dtype)
    mixed = _einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, length, -1)
    return _linear(mixed, params["o_proj"]), (key, value)


def _rotate(x_BTNH: Array, position_ids: Array, theta: float) -> Array:
    """Turn the pairs (i, i + H/2) by position / theta^(2i / H), in fp32."""
    size = x_BTNH.shape[-1]
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequencies = theta ** -(jnp.arange(0, size, 2, dtype=wide) / size)
    angles = position_ids[:, :, None, None].astype(wide) * frequencies
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x_BTNH.dtype)
