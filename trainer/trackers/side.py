"""The process beside the training that feeds one tracker. Nothing in it can reach the run.

    python -m trainer.trackers.side RUN NAME PARENT

Its standard input is a pipe from rank 0: one byte says that the run has ended well, its end alone
that it has not. It then has a few seconds to deliver what is left, and goes, by force if need be.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from trainer.files import exclusive
from trainer.redaction import redact
from trainer.screen import clean
from trainer.trackers.delivery import Delivery, read_settings
from trainer.trackers.protocol import FOLDER

FINISH_SECONDS = 10.0  # to deliver the rest of a run that ended well
BROKEN_OFF_SECONDS = 3.0  # of one that did not: nothing may outlive it for long
POLL_SECONDS = 0.5
RETRY_SECONDS = 60.0
DELIVERED, UNDELIVERED = 0, 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Ending:
    """Watches the parent, in a thread of its own: the tracker's library may block for minutes."""

    def __init__(self, parent: int, on_late: Callable[[], None]) -> None:
        self.parent, self.on_late = parent, on_late
        self.over = threading.Event()
        self.is_complete = False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self.parent:  # the pipe's end alone: a child of it may hold a copy
            if select.select([0], [], [], POLL_SECONDS)[0]:
                self.is_complete = os.read(0, 1) != b""
                break
        self.over.set()
        seconds = FINISH_SECONDS if self.is_complete else BROKEN_OFF_SECONDS
        timer = threading.Timer(seconds, self.on_late)
        timer.daemon = True
        timer.start()


class Side:
    """Delivers for one tracker, and says on the terminal what it could not."""

    def __init__(self, folder: Path, name: str, terminal: int) -> None:
        self.folder, self.name, self.terminal = folder, name, terminal
        self.delivery = Delivery(read_settings(folder)[name], folder)
        self.trouble = ""

    def run(self, parent: int) -> int:
        """Follow the run to its end; return whether all was delivered."""
        ending = Ending(parent, self.leave_late)
        lock = self.folder / FOLDER / f"{self.name}.lock"
        while True:
            try:
                with exclusive(lock):
                    self.delivery.run(
                        lambda: ending.over.wait(POLL_SECONDS), lambda: ending.is_complete
                    )
                return DELIVERED
            except Exception as error:  # a tracker's failure is its own: the run goes on
                if not self.trouble:
                    self.say("does not answer", error)
                self.trouble = first_line(error)
                print(f"{type(error).__name__}: {redact(str(error))}", file=sys.stderr, flush=True)
            if ending.over.wait(RETRY_SECONDS):
                self.say_undelivered()
                return UNDELIVERED

    def leave_late(self) -> None:
        """The time is up: whatever the library waits for, the run has ended."""
        self.trouble = self.trouble or "no time was left"
        self.say_undelivered()
        os._exit(UNDELIVERED)

    def say(self, what: str, error: Exception) -> None:
        """Say once that a tracker is out of order."""
        self._write(
            f"{self.name} {what} ({first_line(error)}); the run goes on, metrics.jsonl has all "
            "points, and it is tried again"
        )

    def say_undelivered(self) -> None:
        """Say what is missing there, and how to send it."""
        self._write(
            f"{self.name} has the curves up to step {self.delivery.last_step} only "
            f"({self.trouble}); `tessera sync run={self.folder}` sends the rest"
        )

    def _write(self, text: str) -> None:
        # One call: other processes write into the same terminal. It may be gone: then nobody reads.
        clean(self.terminal)
        try:
            os.write(self.terminal, f"tessera: {redact(text)}\n".encode())
        except OSError:
            return


def first_line(error: Exception) -> str:
    """Return what an error says, short and fit to be shown."""
    return redact((str(error).splitlines() or [type(error).__name__])[0])[:300]


def main() -> None:
    """Run as a child of rank 0."""
    folder, name, parent = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for number in _STOP_SIGNALS:  # the run decides when to stop, and says so
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # the training comes first where cores are few
    terminal = os.dup(2)
    log = os.open(folder / FOLDER / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)  # libraries print as they like
    os.dup2(log, 2)
    code = Side(folder, name, terminal).run(parent)
    sys.stdout.flush()
    os._exit(code)  # threads of a library may wait for a network that is not there


if __name__ == "__main__":
    main()
