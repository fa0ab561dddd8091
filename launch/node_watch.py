"""Finds hanging ranks of this node in a run that torchrun has started, and ends them.

torchrun sees whether its ranks have ended, not whether they get on. Once those of one node are
killed, it starts all again. Standard library only.
"""

import os
import signal
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.traces import STOPPED, cpu_seconds, read_places
from launch.watchdog import Watchdog, WatchdogSpec
from trainer.directory import attempts_of, newest_step

AGENT = "TESSERA_AGENT_PID"
"""Set for ranks: they end with torchrun, and with 0 where they have saved and stopped, since any
other code makes torchrun start them again."""


class NodeWatch:
    """The ranks that this process has started through torchrun, over all starts of a run."""

    def __init__(
        self, folder: Path, before: Collection[Path], processes: int, spec: WatchdogSpec
    ) -> None:
        """`folder` is that of the run, with the starts `before`; `processes` are on this node."""
        self.folder, self.before, self.processes, self.spec = folder, before, processes, spec
        self.attempt: Path | None = None
        self.ranks: list[int] = []

    def look(self, gap: float) -> str | None:
        """Look `gap` seconds after the last time; kill all ranks of this node where one of them
        hangs, and return what is to be said of it."""
        places = self._places()
        if len(places) < self.processes:  # some have not come so far, or have ended
            return None
        hang = self.watchdog.look(places, gap)
        if hang is None:
            return None
        place = places[hang.rank]
        for each in places:
            with suppress(ProcessLookupError):
                os.kill(each["pid"], signal.SIGKILL)
        what = "is stopped (SIGSTOP)" if place["state"] == STOPPED else "shows no sign of life"
        return (
            f"rank {self.ranks[hang.rank]} {what} in step {place['step']} ({place['phase']}) for "
            f"{hang.seconds:.0f} s (limit of {hang.section}: {hang.limit:.0f} s); the ranks of "
            "this node are killed, and torchrun starts all again while it has restarts left"
        )

    def _places(self) -> list[dict[str, Any]]:
        """Return where the ranks of this node are in the newest start."""
        new = [each for each in attempts_of(self.folder) if each not in self.before]
        if not new:
            return []
        attempt = new[-1]
        if attempt != self.attempt:
            self.attempt, self.ranks = attempt, []
            self.watchdog = Watchdog(self.spec, self.processes, newest_step(self.folder) + 1)
        if len(self.ranks) < self.processes:  # of thousands of ranks only ours are read each time
            found = sorted(int(path.name.split(".")[1]) for path in attempt.glob("place.*.json"))
            told = zip(found, read_places(attempt, found), strict=True)
            self.ranks = [rank for rank, place in told if _is_ours(place)]
        places = [place for place in read_places(attempt, self.ranks) if _is_ours(place)]
        return [place | {"cpu_seconds": cpu_seconds(place["pid"])} for place in places]


def _is_ours(place: dict[str, Any]) -> bool:
    """Whether the process is one that this one has started: numbers are used again."""
    if place.get("host") != socket.gethostname():
        return False
    try:
        variables = Path(f"/proc/{place['pid']}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"{AGENT}={os.getpid()}".encode() in variables
