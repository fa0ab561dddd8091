"""One rank: from a config tree to an exit code and an exit record."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from launch.exit_codes import FINISHED, INTERNAL, PREEMPTED
from launch.last_words import describe, judge_here, leave_record, report, say
from launch.supervisor import ATTEMPT, PARENT, STOP_SIGNALS
from launch.terminal import redact_tracebacks

if TYPE_CHECKING:
    from trainer.control import StopRequest
    from trainer.distributed import Placement
    from trainer.run import Run

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def placement_from(environ: Mapping[str, str]) -> "Placement":
    """Read torchrun's variables."""
    from trainer.distributed import Placement

    if "RANK" not in environ:
        return Placement()
    try:
        return Placement(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            is_distributed=True,
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"RANK is set, but WORLD_SIZE or LOCAL_RANK is missing or no number ({error}); "
            "start with torchrun, or unset RANK"
        ) from None


def execute(run: "Run", placement: "Placement", locate: Callable[[int], Path]) -> int:
    """Train as one rank; return the exit code, after leaving a record beside the config."""
    from launch.terminal import configure_logging, show_cursor
    from trainer.construct import Start, fit
    from trainer.control import StopRequest

    configure_logging(placement.rank)
    request, failure = StopRequest(), None
    _handle_signals(request)
    start = Start(placement=placement, locate=locate, request=request)
    try:
        is_finished = fit(run, start)
        code, reason = (FINISHED, "finished") if is_finished else (PREEMPTED, "stopped by a signal")
        record: dict[str, Any] = {"code": code, "reason": reason, "time": time.time()}
    except Exception as error:  # the one place where every failure becomes an exit code
        failure, record = error, describe(error, start.whereabouts, placement)
    is_supervised = ATTEMPT in os.environ
    attempt = Path(os.environ[ATTEMPT]) if is_supervised else start.whereabouts.attempt
    if attempt:  # first of all: a supervisor or another rank may look for it
        leave_record(attempt, placement.rank, record)
    show_cursor()
    if failure:
        report(failure, record, placement)
        if attempt and record["is_consequence"] and not is_supervised:
            say(judge_here(attempt, placement.world_size))
    return int(record["code"])


def _handle_signals(request: "StopRequest") -> None:
    """First signal: stop after the step, with a save. Second: leave at once."""
    from launch.terminal import show_cursor

    def handle(number: int, _: FrameType | None) -> None:
        if request.is_set:
            show_cursor()
            os._exit(128 + number)
        request.is_set = True

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    # Blocked since before torch was imported, so that none came too early to be handled.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def leave(code: int) -> NoReturn:
    """End this rank: gloo's teardown after a lost peer can end in SIGABRT and hide the code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies; leave if it is dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(INTERNAL)


def main() -> None:
    """Run as one worker of the supervisor."""
    die_with(int(os.environ[PARENT]))
    redact_tracebacks()
    import yaml

    from launch.binding import bind

    attempt = Path(os.environ[ATTEMPT])
    tree: dict[str, Any] = yaml.safe_load((attempt / "config.yaml").read_text())
    tree.pop("launch")
    leave(execute(bind(tree), placement_from(os.environ), lambda _: attempt))


if __name__ == "__main__":
    main()
