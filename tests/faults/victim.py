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


def victim(run: str) -> None:
    """Save once; where that fails, clear up and try again as the run does. Ends the process."""
    lock = start(Path(run))
    with suppress(OSError):  # it is only to be seen
        os.mkdir(MARK)
    code = UNHARMED
    try:
        save_next(Path(run), lock)
    except (OSError, StorageError) as error:
        print(error, file=sys.stderr, flush=True)
        try:
            collect_debris(Path(run) / "checkpoints")
            save_next(Path(run), lock)
            code = RECOVERED
        except (OSError, StorageError) as again:
            print(again, file=sys.stderr, flush=True)
            code = GAVE_UP
    os._exit(code)
