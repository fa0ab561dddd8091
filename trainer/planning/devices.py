"""Accelerators by name: memory and peak of dense products, each with where the number is from."""

from dataclasses import dataclass

import torch

from trainer.auto_mesh import local_memory_gib
from trainer.near_names import did_you_mean
from trainer.precision import Precision

CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device. A peak is None where nobody states one."""

    name: str
    memory_gib: float
    """What its driver shows as total: less than the decimal GB of the data sheet."""
    bf16: float | None
    """FLOP/s, dense, accumulated in fp32."""
    fp32: float | None
    """FLOP/s outside of tensor cores: `precision=fp32` uses no TF32."""
    source: str

    def peak(self, precision: Precision) -> float | None:
        """Return the peak for the type that a step computes in; None: there is none stated."""
        if precision.is_float8:
            return None  # some products are in bf16
        return {torch.bfloat16: self.bf16, torch.float32: self.fp32}.get(precision.compute)


def _device(
    name: str, mib: int, bf16: float, fp32: float, source: str, *, shown: str = "nvidia-smi"
) -> Device:
    source = f"{source}; memory as {shown} shows it"
    return Device(
        name=name, memory_gib=mib / 1024, bf16=bf16 * 1e12, fp32=fp32 * 1e12, source=source
    )


DEVICES = {
    device.name: device
    for device in (
        _device("a100-40", 40_960, 312, 19.5, "NVIDIA A100 data sheet (SXM)"),
        _device("a100", 81_920, 312, 19.5, "NVIDIA A100 data sheet (SXM, 80 GB)"),
        _device("h100", 81_559, 989, 67, "NVIDIA H100 data sheet (SXM)"),
        _device("h200", 143_771, 989, 67, "NVIDIA H200 data sheet (SXM)"),
        _device("mi300x", 196_608, 1307, 163.4, "AMD MI300X data sheet", shown="the data sheet"),
        _device("l40s", 46_068, 362, 91.6, "NVIDIA L40S data sheet"),
        _device("rtx4090", 24_564, 165.2, 82.6, "NVIDIA Ada architecture paper, appendix A"),
    )
}
TABLE = ("rtx4090", "a100-40", "l40s", "h100", "a100", "h200", "mi300x")
"""Columns of the table over layouts, from the smallest memory on."""


def device(name: str, processes: int) -> Device:
    """Return a device; `cpu` is this machine, whose memory so many processes share."""
    if name == CPU:
        share = local_memory_gib(processes)
        return Device(
            name=CPU, memory_gib=share, bf16=None, fp32=None, source="this machine's memory, shared"
        )
    if name not in DEVICES:
        known = (CPU, *DEVICES)
        hint = did_you_mean(name.lower(), known)
        raise ValueError(f"device={name} is unknown; {hint}Known: {', '.join(known)}")
    return DEVICES[name]
