"""The perceiver resampler: any number of image states to a fixed number of latents.

Source: Jaegle et al. 2021; Alayrac et al. 2022 (Flamingo), appendix A.1.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.backends import Backend
from models.nn.checks import check_positive
from models.nn.init import Init


@dataclass(frozen=True, kw_only=True)
class PerceiverSpec:
    """Size of the resampler; field names as in Hugging Face's IdeficsPerceiverConfig."""

    use_resampler: bool = False
    """Written by Hugging Face, read by nobody: the model's own `use_resampler` decides."""
    resampler_n_latents: int = 64
    resampler_depth: int = 6
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    qk_layer_norms_perceiver: bool = False

    def __post_init__(self) -> None:
        names = ("resampler_n_latents", "resampler_depth", "resampler_n_heads")
        check_positive(self, *names, "resampler_head_dim")


class PerceiverAttention(nn.Module):
    """Latents look at the context and at themselves."""

    def __init__(self, spec: PerceiverSpec, size: int, backend: Backend) -> None:
        super().__init__()
        self.head_dim, self.backend = spec.resampler_head_dim, backend
        width = spec.resampler_n_heads * spec.resampler_head_dim
        self.context_layer_norm, self.latents_layer_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.has_qk_norms = spec.qk_layer_norms_perceiver
        if self.has_qk_norms:
            self.q_layer_norm = nn.LayerNorm(self.head_dim)
            self.k_layer_norm = nn.LayerNorm(self.head_dim)
        self.q_proj = nn.Linear(size, width, bias=False)
        self.k_proj = nn.Linear(size, width, bias=False)
        self.v_proj = nn.Linear(size, width, bias=False)
        self.output_proj = nn.Linear(width, size, bias=False)

    def forward(self, context_XSE: Tensor, latents_XLE: Tensor) -> Tensor:
        latents_XLE = self.latents_layer_norm(latents_XLE)
        both_XSE = torch.cat((self.context_layer_norm(context_XSE), latents_XLE), dim=1)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, latents_XLE), (self.k_proj, both_XSE), (self.v_proj, both_XSE),
            )
        )  # fmt: skip
        if self.has_qk_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        scale = self.head_dim**-0.5
        mixed = self.backend.attend(query, key, value, None, dropout=0.0, scale=scale)
        result: Tensor = self.output_proj(mixed.transpose(1, 2).flatten(2))
        return result


class PerceiverMLP(nn.Module):
    """Norm, then a feed-forward layer of four times the width."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(size)
        self.fc = nn.Linear(size, 4 * size, bias=False)
        self.c_proj = nn.Linear(4 * size, size, bias=False)

    def forward(self, x_XLE: Tensor) -> Tensor:
        result: Tensor = self.c_proj(F.relu(self.fc(self.ln(x_XLE))))
        return result


class PerceiverResampler(nn.Module):
    """(X, S, E) image states to (X, L, E) latents."""

    def __init__(
        self, spec: PerceiverSpec, embed_dim: int, num_decoder_layers: int, backend: Backend
    ) -> None:
        super().__init__()
        self.num_decoder_layers = num_decoder_layers
        self.latents = nn.Parameter(torch.empty(spec.resampler_n_latents, embed_dim))
        self.blocks = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(spec, embed_dim, backend), PerceiverMLP(embed_dim)])
            for _ in range(spec.resampler_depth)
        )
        self.layer_norm = nn.LayerNorm(embed_dim)

    def initial(self, std: float) -> dict[str, Init]:
        """Start as the original training code does (the public m4)."""
        size = self.latents.shape[1]
        inits = {"latents": Init(std=size**-0.5)}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and name != "latents":
                factor = 2 * self.num_decoder_layers if name.endswith("c_proj.weight") else 1
                inits[name] = Init(std=(0.4 / (size * factor)) ** 0.5)
        return inits

    def forward(self, context_XSE: Tensor) -> Tensor:
        latents_XLE = self.latents.expand(context_XSE.shape[0], -1, -1)
        for block in self.blocks:
            attention, mlp = block.children()
            latents_XLE = latents_XLE + attention(context_XSE, latents_XLE)
            latents_XLE = latents_XLE + mlp(latents_XLE)
        result: Tensor = self.layer_norm(latents_XLE)
        return result
