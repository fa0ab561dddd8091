"""The launcher of every node but the first: does on its machine what node 0 says.

Standard library only.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.group import Group, Node
from launch.meeting import Link
from launch.signals import STOP_SIGNALS

POLL_SECONDS = 0.05
REPORT_SECONDS = 0.25
SEE_SECONDS = 60.0  # until a shared file system shows here what was written on another node


class Follower:
    """Starts, tells and kills the workers of one node, until node 0 says that the run has ended."""

    def __init__(
        self, node: Node, link: Link, worker: str, first_signal: Callable[[], int | None]
    ) -> None:
        self.node, self.link, self.worker = node, link, worker
        self.first_signal = first_signal
        self.attempt: Path | None = None
        self._group: Group | None = None
        self._has_noted = self._has_told_signal = False
        self._reported: tuple[bool, bool] | None = None
        self._reported_at = 0.0

    def run(self) -> int:
        """Return the exit code that node 0 told; LostError where it cannot any more."""
        try:
            while True:
                message = self.link.receive(POLL_SECONDS)
                if message and message["do"] == "end":
                    return int(message["code"])
                if message:
                    self._obey(message)
                number = self.first_signal()
                if number is not None and not self._has_told_signal:
                    self._has_told_signal = True
                    self.link.send(signal=number)
                self._report()
        finally:
            if self._group:
                self._group.kill()

    def _obey(self, message: dict[str, Any]) -> None:
        if message["do"] == "start":
            self._start(Path(message["attempt"]), message["port"], message["restarts"])
        group = self._group
        if group is None:
            return
        match message["do"]:
            case "signal":
                group.send(message["number"])
            case "note_failure":
                self._note(group)
            case "interrogate":
                group.interrogate()
                self._has_noted = True
            case "kill":
                if group.has_failed:
                    self._note(group)
                self._group = None
                group.kill()
                self.link.send(witnesses=[asdict(each) for each in group.witnesses()])

    def _start(self, attempt: Path, port: int, restarts: int) -> None:
        config = attempt / "config.yaml"
        deadline = time.monotonic() + SEE_SECONDS
        while not config.exists():
            if time.monotonic() > deadline:
                self.link.send(
                    refusal=f"node {self.node.rank} does not see {config}, which node 0 has "
                    "written; set runs= to a folder that all nodes share"
                )
                return
            time.sleep(POLL_SECONDS)
        self.attempt = attempt
        self._has_noted, self._reported = False, None
        self._group = Group(self.node, attempt, self.worker, port, restarts)
        # Workers inherit what is blocked, until they can take it; stacks have a handler later.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._group.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _note(self, group: Group) -> None:
        if not self._has_noted:  # where they were when it began, not when it was heard of
            group.note_failure()
        self._has_noted = True

    def _report(self) -> None:
        """Tell node 0 how it stands here, at once when something has ended."""
        group = self._group
        if group is None:
            return
        state = group.is_running, group.has_failed
        if state[1]:
            self._note(group)
        now = time.monotonic()
        if state != self._reported or now - self._reported_at > REPORT_SECONDS:
            places = group.places_then if state[1] else group.places()
            self.link.send(is_running=state[0], has_failed=state[1], places=places)
            self._reported, self._reported_at = state, now
