"""Rotary settings, and the angular frequencies of every kind."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Kind: (keys it needs, keys it may have).
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (_LLAMA3, ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary settings; keys as in the `rope_parameters` of a Hugging Face config."""

    rope_type: str = "default"
    """One of `default`, `linear`, `dynamic` (NTK), `llama3`, `yarn`."""
    rope_theta: float = 10_000.0
    """Base of the geometric frequency series."""
    factor: float | None = None
    """All but `default`: how many times longer the context is made."""
    low_freq_factor: float | None = None
    """`llama3`: wavelengths above original / low_freq_factor are stretched by `factor`."""
    high_freq_factor: float | None = None
    """`llama3`: wavelengths below original / high_freq_factor stay as they are."""
    original_max_position_embeddings: int | None = None
    """`llama3`, `yarn`: context length of the original model, in tokens."""
    attention_factor: float | None = None
    """`yarn`: factor on cos and sin; None: from `factor` and the mscales."""
    beta_fast: float | None = None
    """`yarn`: rotations over the original context above which nothing is stretched; None: 32."""
    beta_slow: float | None = None
    """`yarn`: rotations below which everything is stretched; None: 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """`yarn`: weights of log(factor) above and below the line of attention_factor."""
    truncate: bool | None = None
    """`yarn`: round the borders of the ramp outwards; None: true."""

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(
                f"rope_type={self.rope_type!r} is unknown; set it to one of {', '.join(KINDS)}"
            )
        needed, optional = KINDS[self.rope_type]
        for name in sorted({key for keys in KINDS.values() for key in (*keys[0], *keys[1])}):
            value = getattr(self, name)
            if value is not None and value is not False and value <= 0:
                raise ValueError(f"{name}={value} is not positive; set it above 0")
            if value is None and name in needed:
                raise ValueError(f"rope_type={self.rope_type!r} needs {name}; set it")
            if value is not None and name not in (*needed, *optional):
                raise ValueError(f"rope_type={self.rope_type!r} has no {name}; remove it")

    def given(self) -> dict[str, Any]:
        """Return the keys that are set: Hugging Face's `rope_parameters`."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def cos_sin_factor(self) -> float:
        """Factor on cos and sin: 1 but for yarn. Source: Peng et al. 2023, eq. 22."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        assert self.factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """Return the (H/2,) angular frequencies in fp32, on the CPU.

    Source: Su et al. 2021; Llama 3.1; Peng et al. 2023. For `dynamic`, those of a short row.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    # fp32 throughout, as Hugging Face computes it: checkpoints were trained with these roundings.
    frequencies = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    if rope.rope_type == "yarn":
        return _yarn(rope.rope_theta**exponents, rope, head_dim)
    return frequencies


def dynamic_frequencies(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, lengths_B1: Tensor
) -> Tensor:
    """Return the (B, H/2) frequencies of rows of these lengths, on their device, without a sync.

    The base grows with a row longer than the context: base * (f L / Lmax - (f - 1)) ^ (H / (H-2)).
    It depends on the row alone, not on its neighbours or on what was seen before.
    """
    assert rope.factor is not None
    lengths = lengths_B1.clamp(min=max_position_embeddings).float()
    growth = rope.factor * lengths / max_position_embeddings - (rope.factor - 1)
    bases_B1 = rope.rope_theta * growth ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=lengths.device) / head_dim
    return 1.0 / bases_B1**exponents


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


def _yarn(periods: Tensor, rope: RopeParameters, head_dim: int) -> Tensor:
    """Stretch what turns less than beta_slow times, keep what turns more than beta_fast times."""
    assert rope.factor
    assert rope.original_max_position_embeddings
    original = rope.original_max_position_embeddings

    def dimension(num_rotations: float) -> float:
        turns = math.log(original / (num_rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # the ramp needs a width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept
