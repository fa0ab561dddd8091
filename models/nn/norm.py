"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise by the root mean square over the last dimension, then scale.

    Statistics are computed in at least fp32; the result is cast back *before* the weight is
    applied, as Llama does. Source: Zhang and Sennrich 2019, eq. 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_D: Tensor) -> Tensor:
        wide = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * inverse_rms).to(x_D.dtype)
