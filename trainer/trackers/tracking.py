"""Rank 0's end of the trackers: starts a process for each, and gives it a little time at the end.

No rank waits for a tracker while the run goes on, and no collective depends on one.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic

from trainer.callbacks.protocol import Callback, RunView
from trainer.progress import Progress
from trainer.screen import labelled
from trainer.trackers.delivery import write_settings
from trainer.trackers.protocol import TrackerSpec
from trainer.trackers.side import BROKEN_OFF_SECONDS, FINISH_SECONDS

log = logging.getLogger(__name__)
KILL_SECONDS = 2.0  # beyond the time that a side process gives itself


class Tracking(Callback):
    """Owns the side processes of a run."""

    def __init__(self, trackers: Mapping[str, TrackerSpec | None]) -> None:
        self.trackers = {name: spec for name, spec in trackers.items() if spec is not None}
        self.sides: list[subprocess.Popen[bytes]] = []

    def on_start(self, view: RunView, progress: Progress) -> None:
        """Start them. metrics.jsonl has been cut back, so each begins with what is true now."""
        if not self.trackers or not view.is_main:
            return
        folder = view.folder.absolute()
        try:  # a full disk or a lack of memory: whoever saves will meet and tell it
            write_settings(folder, self.trackers)
            for name, spec in self.trackers.items():
                log.info("%s", labelled("curves", f"{name}: {spec.describe(view.folder)}"))
                if spec.is_live:
                    self.sides.append(_start(folder, name))
        except OSError as error:
            log.warning("no tracker was started (%s); metrics.jsonl has all points", error)

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        """Let them deliver the rest, and go on without those that cannot."""
        for side in self.sides:
            assert side.stdin is not None
            with suppress(OSError):  # it has died
                if finished:
                    side.stdin.write(b".")
                side.stdin.close()
        budget = FINISH_SECONDS if finished else BROKEN_OFF_SECONDS
        deadline = monotonic() + budget + KILL_SECONDS
        for side in self.sides:
            try:
                side.wait(max(0.0, deadline - monotonic()))
            except subprocess.TimeoutExpired:
                side.kill()
                side.wait()


def _start(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    """Start another interpreter: no fork of our threads, our memory or a GPU's context."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.trackers.side", str(folder), name, str(os.getpid())],
        stdin=subprocess.PIPE,
        bufsize=0,
        cwd=Path(__file__).parents[2],  # where this package is found
        start_new_session=True,  # the terminal's Ctrl-C is for the run, which will tell it
    )
