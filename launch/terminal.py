"""Logging: rank 0 says what happens, the others only what is wrong.

It shares one screen with the status line. No secret passes here, in a line or in a traceback.
"""

import logging
import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from types import TracebackType


class ScreenHandler(logging.Handler):
    """Print through rich's console, which keeps a status line below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        import rich

        rich.get_console().print(
            self.format(record), markup=False, highlight=False, soft_wrap=True, emoji=False
        )


def show_cursor() -> None:
    """Undo what a status line did to the terminal, however the run ended."""
    from trainer.screen import clean  # here: the help needs nothing of the trainer

    with suppress(OSError, ValueError):  # the terminal has gone, or stdout was closed
        screen = sys.__stdout__.fileno() if sys.__stdout__ else -1  # not what rich put before it
        if os.isatty(screen) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            clean(screen)
            os.write(screen, b"\x1b[?25h")


def say(text: str) -> None:
    """Write one line at once, where another process may have left a status line."""
    from trainer.redaction import redact
    from trainer.screen import clean

    clean(2)
    sys.stderr.write(f"tessera: {redact(text)}\n")
    sys.stderr.flush()


def redact_tracebacks() -> None:
    """Print exceptions that nobody catches without the secrets in their texts."""

    def show(
        kind: type[BaseException], error: BaseException | None, where: TracebackType | None
    ) -> None:
        write_traceback(error or kind(), where)

    sys.excepthook = show
    threading.excepthook = lambda given: show(given.exc_type, given.exc_value, given.exc_traceback)


def write_traceback(error: BaseException, where: TracebackType | None = None) -> None:
    """Write an exception as Python does, without the secrets in its text."""
    from trainer.redaction import redact

    lines = traceback.format_exception(type(error), error, where or error.__traceback__)
    sys.stderr.write(redact("".join(lines)))
    sys.stderr.flush()


def configure_logging(rank: int) -> None:
    """Set up our loggers; third-party ones speak from WARNING on."""
    handler = ScreenHandler()
    handler.setFormatter(_Formatter(rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("launch", "trainer", "models"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _Formatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.origin = "" if rank == 0 else f"[{socket.gethostname()}:{rank}] "

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        from trainer.redaction import redact

        return redact(self.origin + level + record.getMessage())
