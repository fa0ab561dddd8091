"""The decoder that Llama and its relatives share, over norms and layers of their choice."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layout import Layout
from models.nn.backends import Backend
from models.nn.cache import Cache, LayerCache, segments_for
from models.nn.rotary import RotaryEmbedding

LAYOUT = Layout(
    blocks=("model.layers.*",),
    colwise=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ),
    rowwise=("self_attn.o_proj", "mlp.down_proj"),
    embedding="model.embed_tokens",
    norm="model.norm",
)


class ScaledEmbedding(nn.Embedding):
    """Embeddings times `scale`, which is rounded to their dtype first."""

    def __init__(self, vocab_size: int, hidden_size: int, *, scale: float) -> None:
        super().__init__(vocab_size, hidden_size)
        self.scale = scale

    def forward(self, ids_BT: Tensor) -> Tensor:
        return scaled(super().forward(ids_BT), self.scale)


def scaled(x_BTD: Tensor, scale: float) -> Tensor:
    """Return x times `scale` as rounded to its dtype: sqrt(3072) is 55.5 in bf16."""
    # Rounded on the CPU: no host sync.
    return x_BTD * torch.tensor(scale, dtype=x_BTD.dtype, device="cpu").item()


class DecoderBlock(nn.Module):
    """Attention, then the feed-forward layer, each behind a norm and added to the residual."""

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        """`dropout` acts on what attention and feed-forward layer add, in training."""
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTH: Tensor,
        sin_BTH: Tensor,
        mask: Any,
        cache: LayerCache | None = None,
    ) -> Tensor:
        normal_BTD = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + self._drop(self.self_attn(normal_BTD, cos_BTH, sin_BTH, mask, cache))
        return x_BTD + self._drop(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class DecoderTrunk(nn.Module):
    """Token ids to hidden states after the final norm."""

    def __init__(
        self,
        *,
        embed_tokens: nn.Embedding,
        layers: list[DecoderBlock],
        norm: nn.Module,
        rotary_emb: RotaryEmbedding,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary_emb = rotary_emb
        self.backend = backend

    @property
    def num_cached_layers(self) -> int:
        return len(self.layers)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the (B, T, D) hidden states of (B, T) ids; attention stays within segments."""
        x_BTD = self.embed_tokens(input_ids)
        cos_BTH, sin_BTH = self.rotary_emb(position_ids, x_BTD.dtype)
        mask = self.backend.prepare(segments_for(segment_ids, cache))
        for index, layer in enumerate(self.layers):
            own = None if cache is None else cache.layer(index)
            x_BTD = layer(x_BTD, cos_BTH, sin_BTH, mask, own)
        result: Tensor = self.norm(x_BTD)
        return result
