"""Attention within segments: causal, never across the border of two packed documents."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.rotary import rotate


def segment_mask(segment_ids_BT: Tensor) -> Tensor:
    """Return the (B, 1, T, T) boolean mask: may position t look at position s?

    True where s <= t and both lie in the same segment. Padding (segment 0) sees padding only, so
    that every row attends to something and no softmax is empty.
    """
    length = segment_ids_BT.shape[1]
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TS = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    return (same_BTS & causal_TS)[:, None]


def eager(
    query_BNTH: Tensor, key_BKSH: Tensor, value_BKSH: Tensor, mask_B1TS: Tensor, dropout: float
) -> Tensor:
    """The slow, obvious reference: softmax in at least fp32 over the masked scores."""
    key_BNSH, value_BNSH = repeat_heads(key_BKSH, query_BNTH), repeat_heads(value_BKSH, query_BNTH)
    scores_BNTS = query_BNTH @ key_BNSH.transpose(-1, -2) / math.sqrt(query_BNTH.shape[-1])
    scores_BNTS = scores_BNTS.masked_fill(~mask_B1TS, -math.inf)
    wide = torch.promote_types(scores_BNTS.dtype, torch.float32)
    weights_BNTS = scores_BNTS.softmax(-1, dtype=wide).to(value_BNSH.dtype)
    return F.dropout(weights_BNTS, dropout) @ value_BNSH


def sdpa(
    query_BNTH: Tensor, key_BKSH: Tensor, value_BKSH: Tensor, mask_B1TS: Tensor, dropout: float
) -> Tensor:
    """torch's fused attention with the exact mask."""
    # With a mask, CUDA's fused kernels take no grouped heads; the CPU's do.
    is_grouped = query_BNTH.device.type == "cpu"
    if not is_grouped:
        key_BKSH, value_BKSH = (repeat_heads(x, query_BNTH) for x in (key_BKSH, value_BKSH))
    return F.scaled_dot_product_attention(
        query_BNTH,
        key_BKSH,
        value_BKSH,
        attn_mask=mask_B1TS,
        dropout_p=dropout,
        enable_gqa=is_grouped,
    )


def repeat_heads(x_BKSH: Tensor, query_BNTH: Tensor) -> Tensor:
    """Repeat each key/value head N/K times contiguously: k0, k0, k1, k1, not tiled."""
    groups = query_BNTH.shape[1] // x_BKSH.shape[1]
    return x_BKSH if groups == 1 else x_BKSH.repeat_interleave(groups, dim=1)


Backend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
BACKENDS: dict[str, Backend] = {"eager": eager, "sdpa": sdpa}


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. Source: Ainslie et al. 2023."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool,
        dropout: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.backend = BACKENDS[backend]
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, mask_B1TS: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        # -1: head counts come from the weights: a tensor-parallel shard needs no other code.
        query_BNTH = self.q_proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        key_BKTH = self.k_proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        value_BKTH = self.v_proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query_BNTH = rotate(query_BNTH, cos_BTH, sin_BTH)
        key_BKTH = rotate(key_BKTH, cos_BTH, sin_BTH)
        dropout = self.dropout if self.training else 0.0
        mixed_BNTH = self.backend(query_BNTH, key_BKTH, value_BKTH, mask_B1TS, dropout)
        return self.o_proj(mixed_BNTH.transpose(1, 2).reshape(batch, length, -1))
