"""How well the hardware is used: MFU by a stated formula, and peak memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trainer.parallel.pieces import unique_parameters

# Dense bf16 peak in FLOP/s by exact device name (vendors' data sheets): a prefix would match slower
# cards.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def num_matmul_weights(model: nn.Module) -> int:
    """Count weights that multiply activations: matrices, the head once, no table of embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_submodule(str(model.head_name)).get_parameter("weight")
    matrices = (p for _, p in unique_parameters(model) if p.ndim >= 2)
    return sum(p.numel() for p in matrices if p is head or id(p) not in tables)


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Adds what the hardware did to each log point."""

    flops_per_token: int
    world_size: int
    device: torch.device
    has_peak: Callable[[], bool]
    """Whether the stated peak and the formula fit: bf16 compute, and nothing frozen by now."""

    def measure(self, tokens_per_second: float) -> dict[str, float | None]:
        """Return `mfu` (None on a device of unknown peak) and `memory_gib`, this rank's peak."""
        return {"mfu": self._mfu(tokens_per_second), "memory_gib": self._memory_gib()}

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self.device.type != "cuda" or not self.has_peak():
            return None
        peak = PEAKS.get(torch.cuda.get_device_name(self.device))
        return tokens_per_second * self.flops_per_token / (peak * self.world_size) if peak else None

    def _memory_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        # Not getrusage: its peak survives fork and exec, so a large parent's would be reported.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20  # Linux counts KiB
