"""Which dtype weights are kept in, and which dtype a step computes in."""

from dataclasses import dataclass
from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`master`: dtype of weights and optimizer state. `compute`: dtype of forward and backward.

    Gradients are reduced over ranks in `master`.
    """

    master: torch.dtype
    compute: torch.dtype
    is_float8: bool = False
    """Whether products of trained linears are taken in float8; see trainer/float8.py."""


PRECISIONS = {
    "fp32": Precision(master=torch.float32, compute=torch.float32),
    "bf16": Precision(master=torch.float32, compute=torch.bfloat16),
    "fp8": Precision(master=torch.float32, compute=torch.bfloat16, is_float8=True),
    "pure_bf16": Precision(master=torch.bfloat16, compute=torch.bfloat16),
    "fp64": Precision(master=torch.float64, compute=torch.float64),
}


def slow_bf16(precision: Precision, device: torch.device, facts: Path = CPU_FACTS) -> bool:
    """Whether this is a CPU that has to emulate bf16: 3.6 times slower than fp32 (docs/log.md).

    Linux says `avx512_bf16` or `amx_bf16` (x86), `bf16` (Arm); elsewhere it is not known.
    """
    if precision.compute != torch.bfloat16 or device.type != "cpu" or not facts.is_file():
        return False
    lines = facts.read_text().splitlines()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "bf16")
    return "bf16" not in flags
