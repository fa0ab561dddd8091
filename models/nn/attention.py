"""Grouped-query self-attention with rotary positions."""

from typing import Any

from torch import Tensor, nn

from models.layout import HeadRows
from models.nn.backends import Backend
from models.nn.cache import LayerCache
from models.nn.rotary import rotate
from models.nn.sliced import colwise, rowwise


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. Source: Ainslie et al. 2023.

    With `tp_slices` = k, the projections are computed in k slices, as k tensor-parallel ranks do.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool,
        dropout: float,
        backend: Backend,
        tp_slices: int = 1,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.backend = backend
        self.tp_slices = tp_slices
        rows = HeadRows(unit=head_dim)
        self.head_rows = {"q_proj": rows, "k_proj": rows, "v_proj": rows}
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BTH: Tensor,
        sin_BTH: Tensor,
        mask: Any,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`mask` is what the back-end prepared; with a cache, keys are those of all positions."""
        batch, length, _ = x_BTD.shape
        query_BNTH = rotate(self._heads(x_BTD, self.q_proj), cos_BTH, sin_BTH)
        key_BKSH = rotate(self._heads(x_BTD, self.k_proj), cos_BTH, sin_BTH)
        value_BKSH = self._heads(x_BTD, self.v_proj)
        if cache is not None:
            key_BKSH, value_BKSH = cache.update(key_BKSH, value_BKSH)
        mixed_BNTH = self.backend.attend(
            query_BNTH,
            key_BKSH,
            value_BKSH,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scale=self.head_dim**-0.5,
        )
        mixed_BTD = mixed_BNTH.transpose(1, 2).reshape(batch, length, -1)
        return rowwise(mixed_BTD, self.o_proj, self.tp_slices)

    def _heads(self, x_BTD: Tensor, projection: nn.Linear) -> Tensor:
        batch, length, _ = x_BTD.shape
        # -1: head counts come from the weights: a tensor-parallel shard needs no other code.
        heads = colwise(x_BTD, projection, self.tp_slices).view(batch, length, -1, self.head_dim)
        return heads.transpose(1, 2)
