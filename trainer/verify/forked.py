"""Run a function on several gloo ranks in forked processes: 0.06 s to start, a limit on time."""

import faulthandler
import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from tempfile import TemporaryFile
from time import monotonic
from typing import Any, NamedTuple

import torch

from trainer.distributed import LOOPBACK, Placement
from trainer.ports import hold_port


class RankFailedError(Exception):
    """What went wrong on which rank, with its traceback."""


class _Rank(NamedTuple):
    process: ForkProcess
    receiver: Connection
    stacks: Any
    """The file for where its threads were when it was ended."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, limit_seconds: float = 150.0
) -> list[Any]:
    """Return `work(placement, *arguments)` of every rank; raise RankFailedError for the first.

    `work` opens its own Ranks. Results must be picklable. No thread may run in this process. Of
    ranks without a result after `limit_seconds` the error tells where all their threads were.
    """
    # What every optimizer, FSDP2 and pipelines import, over a second: once, not in every rank.
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.pipelining  # noqa: F401

    context = mp.get_context("fork")
    ranks: list[_Rank] = []
    with hold_port() as holder, ExitStack() as stack:
        port = holder.getsockname()[1]
        for number in range(world_size):
            placement = Placement(
                rank=number, world_size=world_size, local_rank=number,
                is_distributed=world_size > 1, loopback_port=port if world_size > 1 else None,
            )  # fmt: skip
            receiver, sender = context.Pipe(duplex=False)
            stacks = stack.enter_context(TemporaryFile())
            process = context.Process(
                target=_child, args=(placement, port, sender, stacks, work, arguments)
            )
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            sender.close()
            ranks.append(_Rank(process, receiver, stacks))
        return _collect(ranks, limit_seconds)


def _collect(ranks: list[_Rank], limit_seconds: float) -> list[Any]:
    """Return every rank's result. After a failure the others get a moment to tell theirs."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {number: rank.receiver for number, rank in enumerate(ranks)}
    deadline = monotonic() + limit_seconds
    while waiting and (ready := wait(waiting.values(), max(0.0, deadline - monotonic()))):
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                is_fine, value = waiting.pop(rank).recv()
            except EOFError:
                is_fine, value = False, "died without a result"
            (results if is_fine else failures)[rank] = value
        if failures:
            deadline = min(deadline, monotonic() + 1.0)
    if failures:
        raise RankFailedError(
            "\n".join(f"rank {rank} failed:\n{text}" for rank, text in failures.items())
        )
    if waiting:
        for number in waiting:  # all at once: none shall see the end of another
            pid = ranks[number].process.pid
            assert pid is not None  # it was started
            os.kill(pid, signal.SIGABRT)
        found = "".join(f"\nrank {number}, {_stacks(ranks[number])}" for number in waiting)
        names = ", ".join(map(str, waiting))
        raise RankFailedError(f"no result within {limit_seconds} s from rank {names}{found}")
    return [results[rank] for rank in range(len(ranks))]


def _stacks(rank: _Rank) -> str:
    """Return the stacks of a rank that got SIGABRT, and its CPU time: it was busy, or stuck."""
    before = os.times()
    rank.process.join(5.0)
    rank.process.kill()  # a stopped one takes nothing else
    rank.process.join()
    after = os.times()
    spent = sum(after[2:4]) - sum(before[2:4])
    rank.stacks.seek(0)
    return f"{spent:.1f} s of CPU time:\n{rank.stacks.read().decode()}"


def _child(
    placement: Placement, port: int, sender: Connection, stacks: Any, work: Any, arguments: Any
) -> None:
    faulthandler.enable(stacks)
    torch.set_num_threads(1)
    # Others build groups of their own from the environment: accelerate, DeepSpeed.
    os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port))
    try:
        sender.send((True, work(placement, *arguments)))
    except BaseException:  # whatever it is, the parent shows it
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)
