"""`launch=local`: processes on this machine."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.deadline import note_end
from launch.group import safe_paths
from launch.protocol import Job, Supervised
from launch.request import new_start
from launch.signals import STOP_SIGNALS


@dataclass(frozen=True, kw_only=True)
class LocalSpec(Supervised):
    """Start workers on this machine."""

    processes: int = 1
    """How many; on a machine with GPUs, one for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 1:
            raise ValueError(
                f"launch.processes={self.processes} starts nothing; set it to 1 or more"
            )

    @property
    def world_size(self) -> int:
        return self.processes

    @property
    def is_supervised(self) -> bool:
        """Whether another process watches: it costs one process 3 s at the start."""
        return self.processes > 1 or self.max_restarts(self.processes) > 0

    def check(self) -> None:
        """Raise ValueError for limits without a watch, and where a worker would find no GPU."""
        if self.own_limit and not self.is_supervised:
            raise ValueError(
                f"{self.own_limit} has no effect on one process, which nobody watches; set "
                "launch.restarts to 1 or more, or leave it out"
            )
        import torch

        count = torch.cuda.device_count()
        if count and self.processes > count:
            raise ValueError(
                f"launch.processes={self.processes}, but this machine has {count} GPU(s); "
                f"set it to {count} or less, or train on the CPU with CUDA_VISIBLE_DEVICES="
            )

    def preview(self, job: Job) -> str:
        return ""

    def start(self, job: Job) -> int:
        """Train; return the exit code of the run."""
        # From here on a signal means: stop with 75. It waits until a handler can say so.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        attempt = new_start(job.folder, job.tree, job.words)
        note_end(job.end)
        if self.is_supervised:
            self._become_supervisor(attempt)
        from launch.worker import execute
        from trainer.directory import newest_step
        from trainer.distributed import Placement

        return execute(job.run, Placement(), lambda _: attempt, before=newest_step(job.folder))

    def _become_supervisor(self, attempt: Path) -> None:
        """Replace this process, which has torch in memory, by a small one that watches workers."""
        os.environ |= safe_paths(os.environ)
        sys.stdout.flush()
        limits = json.dumps(self.watchdog and vars(self.watchdog))
        restarts = str(self.max_restarts(self.processes))
        words = [str(self.processes), str(attempt), restarts, limits]
        os.execv(sys.executable, [sys.executable, "-m", "launch.supervisor", *words])
