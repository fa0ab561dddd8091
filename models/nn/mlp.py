"""Gated feed-forward layer."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.activation import ACTIVATIONS
from models.nn.sliced import column_slices


class GatedMLP(nn.Module):
    """Compute `down(act(gate(x)) * up(x))`. Source: Shazeer 2020 (SwiGLU, GEGLU).

    With `tp_slices` = k, gate and up are computed in k row slices and k partial down products are
    added in order: what k tensor-parallel ranks compute, on one device.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        activation: str = "silu",
        tp_slices: int = 1,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.tp_slices = tp_slices
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.tp_slices > 1:
            return self._sliced(x_BTD)
        result: Tensor = self.down_proj(
            self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        )
        return result

    def _sliced(self, x_BTD: Tensor) -> Tensor:
        """Go through all three products one slice at a time: bit for bit what a rank computes.

        The activation too: the last elements of a tensor are computed by other instructions.
        """
        k = self.tp_slices
        gates, ups = column_slices(self.gate_proj, k), column_slices(self.up_proj, k)
        downs = self.down_proj.weight.chunk(k, dim=1)
        parts = [
            F.linear(self.activation(F.linear(x_BTD, *gate)) * F.linear(x_BTD, *up), down)
            for gate, up, down in zip(gates, ups, downs, strict=True)
        ]
        total = sum(parts[1:], start=parts[0])
        return total if self.down_proj.bias is None else total + self.down_proj.bias
