"""Rotary position embedding: cos/sin tables and their application."""

import torch
from torch import Tensor, nn

from models.nn.rope import RopeParameters, dynamic_frequencies, inverse_frequencies


class RotaryEmbedding(nn.Module):
    """Turn positions into the cos and sin tables that every layer shares.

    Tables are an outer product in at least fp32 with autocast off, cast last. No matmul: TF32 would
    corrupt the frequencies (transformers#48428).
    """

    inv_freq: Tensor

    def __init__(self, rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        self.max_position_embeddings = max_position_embeddings
        self.register_buffer("inv_freq", inverse_frequencies(rope, head_dim), persistent=False)

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the buffer anew, after `to_empty` left it undefined."""
        self.inv_freq = inverse_frequencies(self.rope, self.head_dim).to(device)

    def forward(self, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of shape (B, T, H) in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(position_ids_BT.device.type, enabled=False):
            frequencies = self._frequencies(position_ids_BT).to(wide)
            angles = position_ids_BT[:, :, None].to(wide) * frequencies
            angles_BTH = torch.cat((angles, angles), dim=-1)
            factor = self.rope.cos_sin_factor
            return (angles_BTH.cos() * factor).to(dtype), (angles_BTH.sin() * factor).to(dtype)

    def _frequencies(self, position_ids_BT: Tensor) -> Tensor:
        if self.rope.rope_type != "dynamic":
            return self.inv_freq
        lengths_B1 = position_ids_BT.amax(1, keepdim=True) + 1
        limit = self.max_position_embeddings
        return dynamic_frequencies(self.rope, self.head_dim, limit, lengths_B1)[:, None]


def rotate(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) of the head dimension: Hugging Face files' half-split layout."""
    first, second = x_BNTH.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BNTH * cos_BTH[:, None] + turned * sin_BTH[:, None]
