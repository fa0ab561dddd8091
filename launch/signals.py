"""What a signal to a process of a run means: the first one to save and end, the second to leave."""

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from launch.exit_codes import PREEMPTED

if TYPE_CHECKING:
    from trainer.control import StopRequest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENTLY_STOPPING = "the run ends after this step, with a save"
STOPPING = f"{PATIENTLY_STOPPING}; a second signal ends it at once"


def on_stop(handler: Callable[[int, FrameType | None], object]) -> dict[signal.Signals, Any]:
    """Let `handler` take what asks a run to stop; return the handlers of before.

    SIGHUP stays ignored where it is (nohup). A terminal that closes sends it several times, so it
    is never a second signal.
    """
    heard: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
            if heard:
                return
        heard.append(number)
        handler(number, frame)

    is_heeded = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = STOP_SIGNALS if is_heeded else STOP_SIGNALS[:-1]
    return {number: signal.signal(number, take) for number in numbers}


def _leave_terminal() -> None:
    """Write nowhere instead: a terminal that has gone answers with errors, in the midst of a save,
    and does not even say that it is one."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


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

    before = on_stop(leave)
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

    on_stop(handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _write(text: str) -> None:
    """Write a line in one call, as a signal's handler may; below a progress bar, if any."""
    with suppress(OSError):  # nobody reads it any more
        os.write(2, ("\n" * os.isatty(2) + f"tessera: {text}\n").encode())
