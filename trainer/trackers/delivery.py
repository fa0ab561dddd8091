"""From the spool to one tracker: beside a run, or after it by `tessera sync`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.files import read_keys, write_json
from trainer.points import METRICS
from trainer.trackers.protocol import FOLDER, Sink, TrackerSpec
from trainer.trackers.spool import Spool
from trainer.trackers.tensorboard import TensorBoardTracker
from trainer.trackers.wandb import WandbTracker

KINDS: dict[str, Callable[..., TrackerSpec]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}
SETTINGS = "settings.json"


class Delivery:
    """Pushes the rows that a tracker does not have yet, until the run is over."""

    def __init__(self, spec: TrackerSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.spool = Spool(folder / METRICS)
        self.num_rows, self.last_step = 0, 0
        """What was pushed, and up to which step the tracker has the curves."""

    def run(self, is_over: Callable[[], bool], is_complete: Callable[[], bool]) -> None:
        """Deliver until `is_over`, which waits a little each time; raises what the tracker raises.

        A run that broke off may go on with the step of its last row, so that row waits, unless the
        file `is_complete`.
        """
        try:
            self._follow(is_over, is_complete)
        finally:
            self.spool.close()

    def _follow(self, is_over: Callable[[], bool], is_complete: Callable[[], bool]) -> None:
        sink = self._open()
        is_last = False
        while not is_last:
            is_last = is_over()  # asked before reading: what was written until then is delivered
            if self.spool.is_replaced():
                sink.close()
                sink = self._open()
            for row in self.spool.rows(is_complete=is_last and is_complete()):
                if row.step >= sink.next_step:
                    sink.push(row)
                    self.num_rows += 1
                self.last_step = row.step
        sink.close()

    def _open(self) -> Sink:
        sink = self.spec.open(self.folder)
        self.last_step = max(0, sink.next_step - 1)
        return sink


def write_settings(folder: Path, trackers: Mapping[str, TrackerSpec]) -> None:
    """Write what other processes need to know of a run's trackers."""
    (folder / FOLDER).mkdir(exist_ok=True)
    named = {name: {"kind": spec.kind, **vars(spec)} for name, spec in trackers.items()}
    write_json(folder / FOLDER / SETTINGS, named)


def read_settings(folder: Path) -> dict[str, TrackerSpec]:
    """Return the trackers of a run; ValueError in one line where it has none."""
    path = folder / FOLDER / SETTINGS
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FOLDER}/{SETTINGS}: it is no run, or was trained without a tracker; "
            "give the folder of a run that was started with tracker=wandb or tracker=tensorboard"
        )
    found = read_keys(path, "start the run again, which writes the file anew")
    return {name: _spec(path, name, values) for name, values in found.items()}


def _spec(path: Path, name: str, values: Any) -> TrackerSpec:
    try:
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return KINDS[str(settings.pop("kind"))](**settings)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {name}={json.dumps(values)} is no tracker ({error}); start the run again, "
            "which writes the file anew"
        ) from None
