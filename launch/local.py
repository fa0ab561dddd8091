"""`launch=local`: processes on this machine."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LocalLaunch:
    """Start workers on this machine."""

    processes: int = 1
    """How many; on a machine with GPUs, one for each."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(
                f"launch.processes={self.processes} starts nothing; set it to 1 or more"
            )

    def check(self) -> None:
        """Raise ValueError where a worker would find no GPU of its own."""
        import torch

        count = torch.cuda.device_count()
        if count and self.processes > count:
            raise ValueError(
                f"launch.processes={self.processes}, but this machine has {count} GPU(s); "
                f"set it to {count} or less, or train on the CPU with CUDA_VISIBLE_DEVICES="
            )
