"""Gated feed-forward layer."""

from torch import Tensor, nn

from models.nn.activation import ACTIVATIONS
from models.nn.sliced import colwise, rowwise


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
        gate_BTF = self.activation(colwise(x_BTD, self.gate_proj, self.tp_slices))
        up_BTF = colwise(x_BTD, self.up_proj, self.tp_slices)
        return rowwise(gate_BTF * up_BTF, self.down_proj, self.tp_slices)
