"""What every choice of `launch=` has in common: ranks, refusals, and how it starts a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launch.watchdog import WatchdogSpec

RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """A composed and checked run, of which nothing was started."""

    run: Any
    """The bound trainer.run.Run."""
    tree: dict[str, Any]
    """The resolved config, `launch` included: what config.yaml stores."""
    folder: Path
    """Of the run; it may not be there yet."""
    end: float | None
    """When it has to have stopped, in seconds since 1970."""
    words: tuple[str, ...] = ()
    """What was typed, from which a rank composes the same config."""


class Launch(Protocol):
    """One choice of the config group `launch`."""

    @property
    def world_size(self) -> int:
        """How many ranks there are in all."""

    def check(self) -> None:
        """Raise ValueError for what cannot be started from here."""

    def preview(self, job: Job) -> str:
        """Return what `dry_run=true` shows beside the config; empty: nothing."""

    def start(self, job: Job) -> int:
        """Start the run or hand it over; return the exit code of the command."""


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """How a run is watched, for launchers that start their workers themselves."""

    restarts: int | None = None
    """How often in a row all are started again without a new checkpoint before the run gives up
    with exit code 93; null: 3 with several processes, 0 with one, which nobody watches then."""
    watchdog: WatchdogSpec | None = field(default_factory=WatchdogSpec)
    """When a rank counts as hanging; null: never."""

    def __post_init__(self) -> None:
        if self.restarts is not None and self.restarts < 0:
            raise ValueError(f"launch.restarts={self.restarts} is negative; set it to 0 or more")

    def max_restarts(self, world_size: int) -> int:
        """Return `restarts`, or what null comes to."""
        return self.restarts if self.restarts is not None else RESTARTS * (world_size > 1)

    @property
    def own_limit(self) -> str:
        """The first limit of the watchdog that is not its default, as it is typed; empty: none."""
        limits = vars(self.watchdog or WatchdogSpec()).items()
        changed = (f"launch.watchdog.{k}={v}" for k, v in limits if v != getattr(WatchdogSpec, k))
        return next(changed, "")
