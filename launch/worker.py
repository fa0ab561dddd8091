"""One rank: from a config tree to an exit code and an exit record."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.deadline import in_vain, seconds_left
from launch.exit_codes import FINISHED, NO_PROGRESS, PREEMPTED
from launch.group import ATTEMPT, PARENT, PIPE, RESTART_COUNT
from launch.host_memory import keep_few_kernels, keep_freed_memory
from launch.last_words import (
    describe,
    judge_here,
    leave_record,
    newest_of,
    report,
    report_first,
    stopped,
)
from launch.parent import Stacks, die_with, obey
from launch.signals import handle_signals
from launch.start_up import resting_collector
from launch.terminal import redact_tracebacks, say

if TYPE_CHECKING:
    from trainer.construct import Start
    from trainer.distributed import Placement
    from trainer.run import Run


def placement_from(environ: Mapping[str, str]) -> "Placement":
    """Read torchrun's variables."""
    from trainer.distributed import LOOPBACK, Placement

    if "RANK" not in environ:
        return Placement()
    # Of our supervisor, with all ranks on this machine.
    is_ours_alone = ATTEMPT in environ and environ.get("MASTER_ADDR") == LOOPBACK
    try:
        return Placement(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            is_distributed=True,
            loopback_port=int(environ["MASTER_PORT"]) if is_ours_alone else None,
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"RANK is set, but WORLD_SIZE or LOCAL_RANK is missing or no number ({error}); "
            "start with torchrun, or unset RANK"
        ) from None


def refuse_lone_rank(environ: Mapping[str, str]) -> None:
    """Raise ValueError where accelerate has started one process of several, without a rank."""
    is_several = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ
    if is_several and "RANK" not in environ:
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever --num_processes is (MASTER_ADDR "
            "is set, RANK is not); use --multi_gpu, which starts all of them on CPUs too"
        )


def execute(
    run: "Run", placement: "Placement", locate: Callable[[int], Path], *, before: int | None = None
) -> int:
    """Train as one rank; return the exit code, after leaving a record beside the config.

    `before` is the newest saved step, where this process alone says how the run has ended.
    """
    from launch.terminal import configure_logging, show_cursor
    from trainer.construct import Start
    from trainer.control import StopRequest
    from trainer.time_limit import TimeLimit

    configure_logging(placement.rank)
    keep_freed_memory(placement.device.type, os.environ)
    keep_few_kernels(placement.device.type, os.environ)
    request = StopRequest()
    limit = TimeLimit(seconds_left(os.environ, run.stop_at))
    start = Start(
        placement=placement, locate=locate, request=request, limit=limit,
        is_again=os.environ.get(RESTART_COUNT, "0") != "0",
    )  # fmt: skip
    is_supervised = ATTEMPT in os.environ
    stacks = _report_to_supervisor(start) if is_supervised else None
    failure, record = _outcome(run, start, says=placement.is_main and not is_supervised)
    request.is_polled = True  # from here on a signal changes nothing
    attempt = Path(os.environ[ATTEMPT]) if is_supervised else start.whereabouts.attempt
    is_saved = before is None or newest_of(attempt) > before
    if vain := in_vain(record, is_saved, os.environ):
        record |= {"code": NO_PROGRESS, "reason": f"{record['reason']}; {vain}"}
    is_left = attempt is not None and _leave(attempt, placement.rank, record)
    if stacks:
        stacks.close()
    show_cursor()
    if failure and attempt and is_supervised and is_left:
        report_first(failure, record, placement.rank, attempt)
    elif failure:
        report(failure, record, placement, attempt)
        if attempt and record["is_consequence"] and not is_supervised:
            say(judge_here(attempt, placement.world_size))
    elif record["code"] != FINISHED and placement.is_main and not is_supervised:
        say(stopped(record["reason"], attempt, record["code"]))
    if attempt and placement.is_main and not is_supervised:  # else the supervisor does, at the end
        from launch.report.write import try_report

        try_report(attempt.parent.parent)
    return int(record["code"])


def _leave(attempt: Path, rank: int, record: dict[str, Any]) -> bool:
    """Leave the record, first of all: a supervisor or another rank may look for it."""
    try:
        leave_record(attempt, rank, record)
    except OSError as error:  # a full disk: what failed is said all the same
        say(f"rank {rank} could leave no record in {attempt}: {error.strerror}")
        return False
    return True


def _report_to_supervisor(start: "Start") -> Stacks:
    """Be ready to say where this rank is, whatever it does."""
    attempt, rank = Path(os.environ[ATTEMPT]), start.placement.rank
    obey(int(os.environ[PIPE]), attempt, rank, start.whereabouts)
    return Stacks(attempt, rank)


def _outcome(run: "Run", start: "Start", *, says: bool) -> tuple[Exception | None, dict[str, Any]]:
    """Train; return what failed, if anything did, and the exit record.

    `says`: a signal is answered with a line.
    """
    from trainer.construct import fit
    from trainer.errors import StoppedEarlyError
    from trainer.stopping import TIME_LIMIT

    request, failure = start.request, None
    try:
        try:
            handle_signals(request, is_supervised=ATTEMPT in os.environ, says=says)
            if fit(run, start):
                code, reason = FINISHED, "finished"
            else:
                code, reason = PREEMPTED, f"stopped by {request.reason}"
            is_limit = code == PREEMPTED and request.reason == TIME_LIMIT
            record: dict[str, Any] = {
                "code": code, "reason": reason, "time": time.time(), "is_limit": is_limit
            }  # fmt: skip
        except Exception as error:  # the one place where every failure becomes an exit code
            failure, record = error, describe(error, start.whereabouts, start.placement)
    except StoppedEarlyError:  # here, since it may come while a failure is described
        reason = f"stopped by {request.reason} before the first step of this start"
        record = {"code": PREEMPTED, "reason": reason, "time": time.time(), "has_begun": False}
        failure = None
    return failure, record | {"step": start.whereabouts.place["step"]}


def leave(code: int) -> NoReturn:
    """End this rank: gloo's teardown after a lost peer can end in SIGABRT and hide the code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run as one worker of the supervisor."""
    die_with(int(os.environ[PARENT]))
    redact_tracebacks()
    from launch.binding import bind_run
    from trainer.stored_config import read_stored

    attempt = Path(os.environ[ATTEMPT])
    with resting_collector():
        run = bind_run(read_stored(attempt / "config.yaml"))
        leave(execute(run, placement_from(os.environ), lambda _: attempt))


if __name__ == "__main__":
    main()
