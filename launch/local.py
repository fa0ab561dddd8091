"""`launch=local`: processes on this machine."""

from dataclasses import dataclass, field

from launch.watchdog import WatchdogSpec

RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class LocalLaunch:
    """Start workers on this machine."""

    processes: int = 1
    """How many; on a machine with GPUs, one for each."""
    restarts: int | None = None
    """How often in a row all are started again without a new checkpoint before the run gives up
    with exit code 93; null: 3 with several processes, 0 with one, which nobody watches then."""
    watchdog: WatchdogSpec | None = field(default_factory=WatchdogSpec)
    """When a rank counts as hanging; null: never."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(
                f"launch.processes={self.processes} starts nothing; set it to 1 or more"
            )
        if self.restarts is not None and self.restarts < 0:
            raise ValueError(f"launch.restarts={self.restarts} is negative; set it to 0 or more")

    @property
    def max_restarts(self) -> int:
        return self.restarts if self.restarts is not None else RESTARTS * (self.processes > 1)

    @property
    def is_supervised(self) -> bool:
        """Whether another process watches: it costs one process 3 s at the start."""
        return self.processes > 1 or self.max_restarts > 0

    def check(self) -> None:
        """Raise ValueError where a worker would find no GPU of its own."""
        import torch

        count = torch.cuda.device_count()
        if count and self.processes > count:
            raise ValueError(
                f"launch.processes={self.processes}, but this machine has {count} GPU(s); "
                f"set it to {count} or less, or train on the CPU with CUDA_VISIBLE_DEVICES="
            )
