"""Rotary position embedding: frequencies per kind, cos/sin tables, and their application."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary settings; keys as in the `rope_parameters` of a Hugging Face config."""

    rope_type: str = "default"
    """One of `default`, `linear`, `llama3`."""
    rope_theta: float = 10_000.0
    """Base of the geometric frequency series."""
    factor: float | None = None
    """`linear` and `llama3`: how many times longer the context is made."""
    low_freq_factor: float | None = None
    """`llama3`: wavelengths above original / low_freq_factor are stretched by `factor`."""
    high_freq_factor: float | None = None
    """`llama3`: wavelengths below original / high_freq_factor stay as they are."""
    original_max_position_embeddings: int | None = None
    """`llama3`: context length of the original model, in tokens."""

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(
                f"rope_type={self.rope_type!r} is unknown; set it to one of {', '.join(KINDS)}"
            )
        wanted = {
            "default": set(),
            "linear": {"factor"},
            "llama3": {
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            },
        }[self.rope_type]
        optional = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        for name in optional:
            given = getattr(self, name) is not None
            if given and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; set it above 0")
            if given != (name in wanted):
                fix = "remove it" if given else "set it"
                raise ValueError(
                    f"rope_type={self.rope_type!r} {'has no' if given else 'needs'} {name}; {fix}"
                )


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """Return the (H/2,) angular frequencies in fp64, on the CPU.

    Source: Su et al. 2021; Llama 3.1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    # fp32 throughout, as Hugging Face computes it: checkpoints were trained with these roundings.
    frequencies = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeParameters) -> Tensor:
    """Stretch low frequencies by `factor`, keep high ones, interpolate between."""
    assert rope.factor
    assert rope.low_freq_factor
    assert rope.high_freq_factor
    assert rope.original_max_position_embeddings
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(
        wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, frequencies
    )
    smooth = (original / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    is_medium = (wavelengths >= original / rope.high_freq_factor) & (
        wavelengths <= original / rope.low_freq_factor
    )
    return torch.where(is_medium, blended, stretched)


class RotaryEmbedding(nn.Module):
    """Turn positions into the cos and sin tables that every layer shares.

    Tables are an outer product in at least fp32 with autocast off, cast last. No matmul: TF32 would
    corrupt the frequencies (transformers#48428).
    """

    inv_freq: Tensor

    def __init__(self, rope: RopeParameters, head_dim: int) -> None:
        super().__init__()
        self.rope, self.head_dim = rope, head_dim
        self.register_buffer("inv_freq", inverse_frequencies(rope, head_dim), persistent=False)

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the buffer anew, after `to_empty` left it undefined."""
        self.inv_freq = inverse_frequencies(self.rope, self.head_dim).to(device)

    def forward(self, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of shape (B, T, H) in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(position_ids_BT.device.type, enabled=False):
            angles = position_ids_BT[:, :, None].to(wide) * self.inv_freq.to(wide)
            angles_BTH = torch.cat((angles, angles), dim=-1)
            return angles_BTH.cos().to(dtype), angles_BTH.sin().to(dtype)


def rotate(x_BNTH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) of the head dimension: Hugging Face files' half-split layout."""
    first, second = x_BNTH.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BNTH * cos_BTH[:, None] + turned * sin_BTH[:, None]
