"""TensorBoard's event files in the folder of the run: the home of the tensorboard package."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from trainer.trackers.protocol import FOLDER, Row


@dataclass(frozen=True, kw_only=True)
class TensorBoardTracker:
    """Curves for `tensorboard --logdir runs`, which shows every run by its folder."""

    kind: ClassVar[str] = "tensorboard"

    def check(self) -> None:
        """Raise ValueError where tensorboard is not installed."""
        if find_spec("tensorboard") is None:
            raise ValueError(
                "tracker=tensorboard needs the package tensorboard, and it is not installed; run "
                "pip install 'tessera-train[tensorboard]', or set tracker=none"
            )

    @property
    def is_live(self) -> bool:
        return True

    def describe(self, folder: Path) -> str:
        """Say how the curves are to be seen."""
        return f"tensorboard --logdir {folder.parent}"

    def open(self, folder: Path) -> "TensorBoardSink":
        """Begin the event file anew: metrics.jsonl has all, so no point can stand there twice."""
        own = folder / FOLDER / self.kind
        own.mkdir(parents=True, exist_ok=True)
        for old in own.glob("events.out.tfevents.*"):
            old.unlink()
        return TensorBoardSink(own)


class TensorBoardSink:
    """One event file."""

    next_step = 0

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = event_pb2
        self._writer = EventFileWriter(str(folder))
        # A TensorBoard that has read the old file forgets its points.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(step=0, session_log=start))

    def push(self, row: Row) -> None:
        event = self._events.Event(step=row.step, wall_time=row.time)
        for name, number in row.values.items():
            event.summary.value.add(tag=name, simple_value=number)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
