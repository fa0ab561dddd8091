"""Gated feed-forward layer."""

from torch import Tensor, nn
from torch.nn import functional as F


class GatedMLP(nn.Module):
    """Compute `down(silu(gate(x)) * up(x))`. Source: Shazeer 2020 (SwiGLU)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
