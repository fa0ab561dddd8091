"""How well the hardware is used: MFU by a stated formula, and peak memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.flops import Flops

# Dense bf16 peak in FLOP/s by exact device name (vendors' data sheets): a prefix would match slower
# cards.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Adds what the hardware did to each log point."""

    flops: Callable[[], Flops]
    """Of what trains by now."""
    world_size: int
    device: torch.device
    has_peak: bool
    """Whether the stated peak fits: bf16 compute."""

    def measure(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """Return `mfu` (None on a device of unknown peak) and `memory_gib`, this rank's peak.

        `metrics` say how much was done per second.
        """
        return {"mfu": self._mfu(metrics), "memory_gib": peak_memory_gib(self.device)}

    def _mfu(self, metrics: Mapping[str, Any]) -> float | None:
        if self.device.type != "cuda" or not self.has_peak:
            return None
        peak = PEAKS.get(torch.cuda.get_device_name(self.device))
        flops = self.flops().of(
            tokens=metrics["tokens_per_second"],
            onlookers=metrics.get("onlookers_per_second", 0.0),
            images=metrics.get("images_per_second", 0.0),
        )
        return flops / (peak * self.world_size) if peak else None


def peak_memory_gib(device: torch.device) -> float:
    """Return the most that this process ever held on the device, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return host_bytes("VmHWM") / 2**30


def host_bytes(kind: Literal["VmHWM", "VmRSS"]) -> int:
    """Return what this process holds of the host now (VmRSS), or held at most (VmHWM)."""
    # Not getrusage: its peak survives fork and exec, so a large parent's would be reported.
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) * 2**10  # Linux counts KiB


def held_before(device: torch.device) -> dict[str, int]:
    """Return what this process holds of the host before it builds a run that trains there.

    What the run is planned to need is to be compared with what the process grows by.
    """
    return {"host_bytes_before": host_bytes("VmRSS")} if device.type == "cpu" else {}
