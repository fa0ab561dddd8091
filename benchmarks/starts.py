"""How benchmarks start a run: as `tessera train` ends up doing, without its folders of logs."""

import os
from pathlib import Path

from launch.host_memory import keep_few_kernels, keep_freed_memory
from trainer.construct import Start
from trainer.control import StopRequest
from trainer.directory import CONFIG, new_attempt
from trainer.distributed import Placement


def start_in(folder: Path, placement: Placement | None = None) -> Start:
    """Return a start whose attempt lies in `folder`; one process where no placement is given."""

    def locate(_: int) -> Path:
        attempt = new_attempt(folder)
        (attempt / CONFIG).write_text("made: by a benchmark\n")  # the record of the run copies it
        return attempt

    placement = placement or Placement()
    keep_freed_memory(placement.device.type, os.environ)
    keep_few_kernels(placement.device.type, os.environ)
    return Start(placement=placement, locate=locate, request=StopRequest())
