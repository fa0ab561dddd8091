"""Which dtype weights are kept in, and which dtype a step computes in."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`master`: dtype of weights and optimizer state. `compute`: dtype of forward and backward.

    Gradients are reduced over ranks in `master`.
    """

    master: torch.dtype
    compute: torch.dtype


PRECISIONS = {
    "fp32": Precision(master=torch.float32, compute=torch.float32),
    "bf16": Precision(master=torch.float32, compute=torch.bfloat16),
    "pure_bf16": Precision(master=torch.bfloat16, compute=torch.bfloat16),
    "fp64": Precision(master=torch.float64, compute=torch.float64),
}
