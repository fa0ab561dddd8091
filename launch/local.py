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
