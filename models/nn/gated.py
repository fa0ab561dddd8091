"""Gated cross-attention from text to images: starts as the identity where its alphas are zero.

Source: Alayrac et al. 2022 (Flamingo), section 3.1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layout import HeadRows
from models.nn.backends import Backend
from models.nn.init import Init
from models.nn.mlp import GatedMLP
from models.nn.norm import RMSNorm

ALPHA_INITIALIZERS = ("zeros", "ones", "normal", "gaussian", "random")
ALPHA_TYPES = ("float", "vector")


class ImageMask:
    """Which image states every text position may look at, in the forms that a block needs."""

    def __init__(self, image_attention_mask_BTI: Tensor, states_per_image: int) -> None:
        mask_BTS = (image_attention_mask_BTI != 0).repeat_interleave(states_per_image, dim=-1)
        has_image_BT1 = mask_BTS.any(-1, keepdim=True)
        # A position without image looks everywhere and is zeroed after: no kernel meets an empty
        # row.
        self.mask_B1TS = (mask_BTS | ~has_image_BT1)[:, None]
        self.is_blind_BT1 = ~has_image_BT1
        self.is_blank = False
        """Whether it is known, without a look at the mask, that no position sees an image."""

    @classmethod
    def blank(cls, segments_BT: Tensor, num_states: int) -> "ImageMask":
        """Return the mask of `num_states` states that no position looks at."""
        mask = cls(torch.zeros_like(segments_BT)[..., None], num_states)
        mask.is_blank = True
        return mask


class CrossAttention(nn.Module):
    """Text queries over image keys and values; norms per head where the spec has them."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        image_size: int,
        *,
        qk_layer_norms: bool,
        eps: float,
        dropout: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.dropout, self.backend, self.has_qk_norms = dropout, backend, qk_layer_norms
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(image_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(image_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        rows = HeadRows(unit=self.head_dim)
        self.head_rows = {"q_proj": rows, "k_proj": rows, "v_proj": rows}
        if qk_layer_norms:
            self.q_layer_norm = RMSNorm(self.head_dim, eps)
            self.k_layer_norm = RMSNorm(self.head_dim, eps)

    def forward(self, x_BTD: Tensor, states_BSE: Tensor, mask: ImageMask) -> Tensor:
        """Positions without an image get zeros."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, x_BTD), (self.k_proj, states_BSE), (self.v_proj, states_BSE),
            )
        )  # fmt: skip
        if self.has_qk_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        dropout = self.dropout if self.training and not mask.is_blank else 0.0
        scale = self.head_dim**-0.5
        mixed = self.backend.attend(query, key, value, mask.mask_B1TS, dropout=dropout, scale=scale)
        # Here, not behind o_proj: this side of it sees all tokens of a row on every layout.
        mixed_BTD = mixed.transpose(1, 2).flatten(2).masked_fill(mask.is_blind_BT1, 0.0)
        result: Tensor = self.o_proj(mixed_BTD)
        return result


class GatedCrossBlock(nn.Module):
    """x + tanh(alpha) * cross-attention, then x + tanh(alpha) * feed-forward layer."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        cross_attn: CrossAttention,
        *,
        hidden_act: str,
        eps: float,
        dropout: float,
        alpha_type: str,
        alpha: Init,
        num_decoder_layers: int,
    ) -> None:
        super().__init__()
        self.dropout, self.alpha, self.num_decoder_layers = dropout, alpha, num_decoder_layers
        self.cross_attn = cross_attn
        self.mlp = GatedMLP(hidden_size, intermediate_size, bias=False, activation=hidden_act)
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        shape = (1, 1, hidden_size) if alpha_type == "vector" else (1,)
        self.alpha_cross_attn = nn.Parameter(torch.empty(shape))
        self.alpha_dense = nn.Parameter(torch.empty(shape))

    def initial(self, std: float) -> dict[str, Init]:
        """Start as the original training code does (the public m4)."""
        inits = {"alpha_cross_attn": self.alpha, "alpha_dense": self.alpha}
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                factor = 2 * self.num_decoder_layers if "down_proj" in name else 1
                inits[name] = Init(std=(0.4 / (parameter.shape[1] * factor)) ** 0.5)
        return inits

    def image_weights(self) -> Iterator[nn.Parameter]:
        """Yield the weights that act on images alone."""
        yield from (*self.cross_attn.parameters(), *self.input_layernorm.parameters())
        yield self.alpha_cross_attn

    def forward(
        self, x_BTD: Tensor, states_BSE: Tensor | None = None, mask: ImageMask | None = None
    ) -> Tensor:
        """Without image states the cross-attention adds nothing; the feed-forward layer acts."""
        if states_BSE is not None:
            assert mask is not None
            # A node of its own: the gradients of this block's keys and values are added first, as
            # they are where the block is an FSDP2 unit, or the sums would differ in the last bit.
            states_BSE = states_BSE.view_as(states_BSE)
            crossed = self.cross_attn(self.input_layernorm(x_BTD), states_BSE, mask)
            crossed = F.dropout(crossed, self.dropout, self.training and not mask.is_blank)
            x_BTD = x_BTD + self.alpha_cross_attn.tanh() * crossed
        dense = self.mlp(self.post_attention_layernorm(x_BTD))
        dense = F.dropout(dense, self.dropout, self.training)
        return x_BTD + self.alpha_dense.tanh() * dense
