"""A bare interpreter that saves once: what `test_system_calls.py` harms. It imports little."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from tests.faults.test_kill_sweep import GAVE_UP, UNHARMED, save_next, start
from trainer.checkpoint.retention import collect_debris
from trainer.errors import StorageError

MARK = "/dev/null/begins"  # a folder that nobody can make
RECOVERED = 3


def say(error: Exception) -> None:
    """Tell of a failure, if anything can be written at all: no failed message ends a run."""
    with suppress(OSError):
        print(error, file=sys.stderr, flush=True)


def victim(run: str) -> None:
    """Save once; where that fails, clear up and try again as the run does. Ends the process."""
    lock = start(Path(run))
    with suppress(OSError):  # it is only to be seen
        os.mkdir(MARK)
    code = UNHARMED
    try:
        save_next(Path(run), lock)
    except (OSError, StorageError) as error:
        say(error)
        try:
            collect_debris(Path(run) / "checkpoints")
            save_next(Path(run), lock)
            code = RECOVERED
        except (OSError, StorageError) as again:
            say(again)
            code = GAVE_UP
    os._exit(code)
