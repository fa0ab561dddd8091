"""What a signal to a process of a run means: the first one to save and end, the second to leave."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from launch.exit_codes import PREEMPTED

if TYPE_CHECKING:
    from trainer.control import StopRequest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENTLY_STOPPING = "the run ends after this step, with a save"
STOPPING = f"{PATIENTLY_STOPPING}; a second signal ends it at once"


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Until training is prepared for them: end at once with the code for a stop."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        name = signal.Signals(number).name
        for each in STOP_SIGNALS:  # the way out is short, and not to be left
            signal.signal(each, signal.SIG_IGN)
        print(
            f"tessera: stopped by {name} before anything was started; "
            f"the same command starts anew (exit code {PREEMPTED})",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(PREEMPTED)

    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle_signals(
    request: "StopRequest", *, is_supervised: bool = False, says: bool = False
) -> None:
    """Turn signals into a request to stop, which the loop takes up; `says` so at once.

    Before the first step there is nothing to save: StoppedEarlyError is raised where the process
    is. They were blocked since before torch was imported: none came too early to be handled.
    A worker of a supervisor takes a second one for the first, which came to both of them: who wants
    it to end at once tells the supervisor, which kills.
    """
    from launch.terminal import show_cursor
    from trainer.errors import StoppedEarlyError

    def handle(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if request.is_set and is_supervised:
            return
        if request.is_set:
            show_cursor()
            if says:
                _write(
                    f"{name}: stopped at once by a second signal, without a save "
                    f"(exit code {128 + number})"
                )
            os._exit(128 + number)
        request.is_set, request.reason = True, name
        if says and request.is_polled:
            _write(f"{name}: {STOPPING}")
        if not request.is_polled:
            raise StoppedEarlyError

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _write(text: str) -> None:
    """Write a line in one call, as a signal's handler may; below a progress bar, if any."""
    with suppress(OSError):  # nobody reads it any more
        os.write(2, ("\n" * os.isatty(2) + f"tessera: {text}\n").encode())
