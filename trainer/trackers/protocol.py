"""What a tracker is: settings that open a sink, and a sink that takes rows in order of steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

FOLDER = "tracker"  # in the folder of the run: all that trackers write


@dataclass(frozen=True, kw_only=True)
class Row:
    """All numbers of one step, by names such as `train/loss`."""

    step: int
    time: float
    """When the last of them was written, in seconds since 1970."""
    values: dict[str, float]


class Sink(Protocol):
    """An open connection to where the curves are shown."""

    @property
    def next_step(self) -> int:
        """The first step that is not there yet; rows before it are not pushed again."""

    def push(self, row: Row) -> None: ...

    def close(self) -> None:
        """Return when all that was pushed has arrived."""


class TrackerSpec(Protocol):
    """A tracker's settings: plain values, which a second process is given as JSON."""

    kind: ClassVar[str]

    def check(self) -> None:
        """Raise ValueError where its package is not installed, without importing it."""

    @property
    def is_live(self) -> bool:
        """Whether it is fed while the run goes on."""

    def describe(self, folder: Path) -> str:
        """Say where the curves of the run in `folder` are to be seen."""

    def open(self, folder: Path) -> Sink:
        """Connect the run in `folder`; whatever goes wrong is raised. May take its time."""
