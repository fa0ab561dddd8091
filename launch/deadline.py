"""When a run has to have stopped: `stop_at`, and the end of its Slurm job, whichever comes first.

It is found once, when the command starts: a restarted worker has not more time than the first one.
"""

import math
import os
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970
END = "TESSERA_END_TIME"


def note_end(end: float | None) -> None:
    """Leave the end for the processes that this one starts or becomes."""
    os.environ.pop(END, None)
    if end is not None:
        os.environ[END] = str(end)


def seconds_left(environ: Mapping[str, str], stop_at: str | None) -> float:
    """Return how long this run may still go on; infinite without a limit."""
    known = environ.get(END)
    end = float(known) if known else end_time(stop_at, environ)
    return math.inf if end is None else end - time.time()


def refuse_past(stop_at: str | None) -> None:
    """Raise ValueError for a `stop_at` that has come before anything is started."""
    end = end_time(stop_at, {})
    if end is not None and end <= time.time():
        raise ValueError(f"stop_at={stop_at} has passed; set it to a later time, or to null")


def in_vain(record: Mapping[str, Any], saved: bool, environ: Mapping[str, str]) -> str:
    """Say that `stop_at` ends every start of a run before it has saved a step; empty: it does not.

    The end of a Slurm job is another matter: the next one may have more time.
    """
    if saved or not record.get("is_limit") or SLURM_END in environ:
        return ""
    return "stop_at leaves no time for a start, a step and its save: set it later"


def end_time(stop_at: str | None, environ: Mapping[str, str]) -> float | None:
    """Return the end in seconds since 1970, None: there is none. ValueError for no time."""
    ends = []
    if stop_at is not None:
        from trainer.time_limit import end_of

        ends.append(end_of(stop_at, datetime.now().astimezone()).timestamp())
    if environ.get(SLURM_END, "").isdigit():
        ends.append(float(environ[SLURM_END]))
    return min(ends, default=None)
