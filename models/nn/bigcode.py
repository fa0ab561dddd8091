"""The pre-norm block of GPT-BigCode: fused attention, cross-attention, feed-forward layer."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.layout import HeadRows
from models.nn.activation import ACTIVATIONS
from models.nn.backends import Backend
from models.nn.cache import LayerCache
from models.nn.dense import Eager


class _Attend(nn.Module):
    """What self- and cross-attention share: back-end, scale, dropout, output projection."""

    def __init__(self, spec: Any, backend: Backend, layer_index: int) -> None:
        super().__init__()
        self.head_dim = spec.n_embd // spec.n_head
        self.scale = self.head_dim**-0.5 if spec.scale_attn_weights else 1.0
        self.attn_pdrop, self.resid_pdrop = spec.attn_pdrop, spec.resid_pdrop
        is_wide = spec.attention_softmax_in_fp32
        shrink = layer_index + 1 if is_wide and spec.scale_attention_softmax_in_fp32 else 1
        is_eager = isinstance(backend, Eager)
        self.backend = Eager(is_wide=is_wide, shrink=shrink) if is_eager else backend
        self.c_proj = nn.Linear(spec.n_embd, spec.n_embd)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Return the (B, T, D) output of (B, N, T, H) queries over (B, K, S, H) keys, values."""
        mixed_BNTH = self.backend.attend(
            query, key, value, mask,
            dropout=self.attn_pdrop if self.training else 0.0, scale=self.scale,
        )  # fmt: skip
        mixed_BTD = self.c_proj(mixed_BNTH.transpose(1, 2).flatten(2))
        return F.dropout(mixed_BTD, self.resid_pdrop, self.training)


class BigCodeAttention(_Attend):
    """Self-attention with fused projections.

    Rows of `c_attn` with multi-query: queries of all heads, then one key, then one value. Without:
    for each head its query, key and value, one head after the other (unlike GPT-2).
    """

    def __init__(self, spec: Any, backend: Backend, layer_index: int) -> None:
        super().__init__(spec, backend, layer_index)
        self.multi_query = spec.multi_query
        kv_heads = 1 if spec.multi_query else spec.n_head
        size = self.head_dim
        self.c_attn = nn.Linear(spec.n_embd, spec.n_embd + 2 * kv_heads * size)
        fused = (
            HeadRows(unit=size, shared=2 * size, shared_parts=2)
            if spec.multi_query
            else HeadRows(unit=3 * size, parts=3)
        )
        self.head_rows = {"c_attn": fused}

    def forward(self, x_BTD: Tensor, mask: Any, cache: LayerCache | None) -> Tensor:
        # -1: head counts come from the weights: a tensor-parallel shard needs no other code.
        size = self.head_dim
        if self.multi_query:
            heads = self.c_attn(x_BTD).unflatten(-1, (-1, size)).transpose(1, 2)
            query, key, value = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
        else:
            heads = self.c_attn(x_BTD).unflatten(-1, (-1, 3 * size)).transpose(1, 2)
            query, key, value = heads.split(size, dim=-1)
        if cache is not None:
            key, value = cache.update(key, value)
        return self.mix(query, key, value, mask)


class BigCodeCrossAttention(_Attend):
    """Attention over an encoder's states: no causality, no cache.

    Rows of `c_attn`: for each head its key and value, one head after the other, in line with
    self-attention. (No released model has these weights; Hugging Face's code fails for more than
    one head.)
    """

    def __init__(self, spec: Any, backend: Backend, layer_index: int) -> None:
        super().__init__(spec, backend, layer_index)
        self.q_attn = nn.Linear(spec.n_embd, spec.n_embd)
        self.c_attn = nn.Linear(spec.n_embd, 2 * spec.n_embd)
        size = self.head_dim
        self.head_rows = {"q_attn": HeadRows(unit=size), "c_attn": HeadRows(unit=2 * size, parts=2)}

    def forward(self, x_BTD: Tensor, states_BSD: Tensor, mask: Any) -> Tensor:
        size = self.head_dim
        query = self.q_attn(x_BTD).unflatten(-1, (-1, size)).transpose(1, 2)
        pairs = self.c_attn(states_BSD).unflatten(-1, (-1, 2 * size)).transpose(1, 2)
        key, value = pairs.split(size, dim=-1)
        return self.mix(query, key, value, mask)


class BigCodeMLP(nn.Module):
    """Feed-forward layer without a gate."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        width = spec.n_inner or 4 * spec.n_embd
        self.activation = ACTIVATIONS[spec.activation_function]
        self.c_fc = nn.Linear(spec.n_embd, width)
        self.c_proj = nn.Linear(width, spec.n_embd)
        self.resid_pdrop = spec.resid_pdrop

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.c_proj(self.activation(self.c_fc(x_BTD)))
        return F.dropout(x_BTD, self.resid_pdrop, self.training)


class BigCodeBlock(nn.Module):
    """Attention, cross-attention where the spec has it, feed-forward: each behind a norm."""

    def __init__(self, spec: Any, backend: Backend, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(spec.n_embd, eps=spec.layer_norm_epsilon)
        self.attn = BigCodeAttention(spec, backend, layer_index)
        self.ln_2 = nn.LayerNorm(spec.n_embd, eps=spec.layer_norm_epsilon)
        if spec.add_cross_attention:
            self.crossattention = BigCodeCrossAttention(spec, backend, layer_index)
            self.ln_cross_attn = nn.LayerNorm(spec.n_embd, eps=spec.layer_norm_epsilon)
        self.has_cross = spec.add_cross_attention
        self.mlp = BigCodeMLP(spec)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Any,
        cache: LayerCache | None,
        states_BSD: Tensor | None = None,
        cross_mask: Any = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), mask, cache)
        if states_BSD is not None:
            if not self.has_cross:
                raise ValueError(
                    "encoder_hidden_states were given, the model has no cross-attention; "
                    "set add_cross_attention=true"
                )
            crossed = self.crossattention(self.ln_cross_attn(x_BTD), states_BSD, cross_mask)
            x_BTD = x_BTD + crossed
        return x_BTD + self.mlp(self.ln_2(x_BTD))
