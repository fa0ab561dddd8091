"""Root-mean-square normalisation, in Llama's and in Gemma's form."""

import torch
from torch import Tensor, nn

from models.nn.init import Init


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
        return self.weight * _normalise(x_D, self.eps).to(x_D.dtype)


class GemmaRMSNorm(nn.Module):
    """The same, times (1 + weight) in at least fp32, cast last; the weight starts at zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def initial(self, std: float) -> dict[str, Init]:
        return {"weight": Init()}

    def forward(self, x_D: Tensor) -> Tensor:
        normal = _normalise(x_D, self.eps)
        return (normal * (1.0 + self.weight.to(normal.dtype))).to(x_D.dtype)


def _normalise(x_D: Tensor, eps: float) -> Tensor:
    wide = x_D.to(torch.promote_types(x_D.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
