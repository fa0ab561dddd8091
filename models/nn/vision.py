"""A CLIP-style vision tower: patches, a class token, learned positions, a pre-norm encoder.

Source: Radford et al. 2021; Dosovitskiy et al. 2021. Module names are those of Idefics in Hugging
Face, `pre_layrnorm` included.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.activation import ACTIVATIONS, check_activation
from models.nn.backends import Backend
from models.nn.checks import check_positive, check_probabilities
from models.nn.init import Init


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """Size of the tower; field names as in Hugging Face's IdeficsVisionConfig."""

    embed_dim: int = 768
    image_size: int = 224
    """Height and width, in pixels."""
    intermediate_size: int = 5120
    patch_size: int = 14
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        names = ("embed_dim", "image_size", "intermediate_size", "patch_size", "num_channels")
        check_positive(self, *names, "num_hidden_layers", "num_attention_heads")
        check_probabilities(self, "attention_dropout")
        check_activation("vision_config.hidden_act", self.hidden_act)
        if self.embed_dim % self.num_attention_heads:
            raise ValueError(
                f"vision_config.num_attention_heads={self.num_attention_heads} does not divide "
                f"embed_dim={self.embed_dim}; change one of them"
            )

    @property
    def grid_size(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


class VisionEmbeddings(nn.Module):
    """Pixels to patch embeddings behind one class token, with learned positions."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid = (
            spec.image_size, spec.patch_size, spec.grid_size,
        )  # fmt: skip
        self.class_embedding = nn.Parameter(torch.empty(spec.embed_dim))
        self.patch_embedding = nn.Conv2d(
            spec.num_channels, spec.embed_dim, spec.patch_size, stride=spec.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(self.grid**2 + 1, spec.embed_dim)

    def initial(self, std: float) -> dict[str, Init]:
        return {"class_embedding": Init(std=self.class_embedding.numel() ** -0.5)}

    def forward(self, pixels_XCHW: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Return (X, P + 1, E); ValueError for another image size without interpolation."""
        height, width = pixels_XCHW.shape[-2:]
        is_expected = (height, width) == (self.image_size, self.image_size)
        if not (is_expected or interpolate_pos_encoding):
            raise ValueError(
                f"images are {height} x {width} pixels, the model takes {self.image_size} x "
                f"{self.image_size}; resize them or set interpolate_pos_encoding=true"
            )
        weight = self.patch_embedding.weight
        patches_XPE = self.patch_embedding(pixels_XCHW.to(weight.dtype)).flatten(2).transpose(1, 2)
        classes_X1E = self.class_embedding.expand(pixels_XCHW.shape[0], 1, -1)
        positions = self.position_embedding.weight
        if not is_expected:
            grid = (height // self.patch_size, width // self.patch_size)
            positions = self._interpolated(positions, grid)
        return torch.cat((classes_X1E, patches_XPE), dim=1) + positions

    def _interpolated(self, positions_PE: Tensor, grid: tuple[int, int]) -> Tensor:
        """Stretch the learned grid of positions over another one, bicubically, in fp32."""
        square = positions_PE[1:].T.reshape(1, -1, self.grid, self.grid)
        wide = torch.promote_types(square.dtype, torch.float32)
        # 0.1: without it rounding may lose a row (dino#8), and checkpoints were used with it.
        factors = tuple((size + 0.1) / self.grid for size in grid)
        stretched = F.interpolate(square.to(wide), scale_factor=factors, mode="bicubic")
        if tuple(stretched.shape[-2:]) != grid:
            raise ValueError(
                f"positions of {grid[0]} x {grid[1]} patches came out as "
                f"{tuple(stretched.shape[-2:])}; choose another image size"
            )
        flat = stretched.flatten(2)[0].T.to(positions_PE.dtype)
        return torch.cat((positions_PE[:1], flat))


class VisionAttention(nn.Module):
    """Self-attention over all patches of an image."""

    def __init__(self, spec: VisionSpec, backend: Backend) -> None:
        super().__init__()
        size = spec.embed_dim
        self.head_dim = size // spec.num_attention_heads
        self.dropout, self.backend = spec.attention_dropout, backend
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x_XPE: Tensor) -> Tensor:
        query, key, value = (
            projection(x_XPE).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = self.backend.attend(
            query, key, value, None, dropout=dropout, scale=self.head_dim**-0.5
        )
        result: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return result


class VisionMLP(nn.Module):
    """Feed-forward layer without a gate."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.hidden_act]
        self.fc1 = nn.Linear(spec.embed_dim, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.embed_dim)

    def forward(self, x_XPE: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.activation(self.fc1(x_XPE)))
        return result


class VisionBlock(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, spec: VisionSpec, backend: Backend) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.embed_dim, eps=spec.layer_norm_eps)
        self.self_attn = VisionAttention(spec, backend)
        self.layer_norm2 = nn.LayerNorm(spec.embed_dim, eps=spec.layer_norm_eps)
        self.mlp = VisionMLP(spec)

    def forward(self, x_XPE: Tensor) -> Tensor:
        x_XPE = x_XPE + self.self_attn(self.layer_norm1(x_XPE))
        result: Tensor = x_XPE + self.mlp(self.layer_norm2(x_XPE))
        return result


class VisionTower(nn.Module):
    """Images to the states of their class token and patches."""

    never_trains = ("post_layernorm",)

    def __init__(self, spec: VisionSpec, backend: Any) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(spec)
        self.pre_layrnorm = nn.LayerNorm(spec.embed_dim, eps=spec.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionBlock(spec, backend) for _ in range(spec.num_hidden_layers)
        )
        # In the files, but of the pooled output alone: what the decoder sees goes around it.
        # It never sees a gradient, so it never trains.
        norm = nn.LayerNorm(spec.embed_dim, eps=spec.layer_norm_eps)
        self.post_layernorm = norm.requires_grad_(False)

    def forward(self, pixels_XCHW: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Return the (X, P + 1, E) last hidden states, class token included, not normalised."""
        x_XPE = self.pre_layrnorm(self.embeddings(pixels_XCHW, interpolate_pos_encoding))
        for layer in self.encoder.get_submodule("layers").children():
            x_XPE = layer(x_XPE)
        return x_XPE
