"""Run a function on several gloo ranks in forked processes: 0.06 s to start, a limit on time."""

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

import torch

from trainer.distributed import LOOPBACK, Placement
from trainer.ports import free_port


class RankFailedError(Exception):
    """What went wrong on which rank, with its traceback."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, limit_seconds: float = 60.0
) -> list[Any]:
    """Return `work(placement, *arguments)` of every rank; raise RankFailedError for the first.

    `work` opens its own Ranks. Results must be picklable. No thread may run in this process.
    """
    # What every optimizer, FSDP2 and pipelines import, over a second: once, not in every rank.
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.pipelining  # noqa: F401

    context = mp.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_child, args=(rank, world_size, port, pipe[1], work, arguments))
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes], limit_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(receivers: list[Connection], limit_seconds: float) -> list[Any]:
    """Return every rank's result. After a failure the others get a moment to tell theirs."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(receivers))
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
        ranks = ", ".join(map(str, waiting))
        raise RankFailedError(f"no result within {limit_seconds} s from rank {ranks}")
    return [results[rank] for rank in range(len(receivers))]


def _child(
    rank: int,
    world_size: int,
    port: int,
    sender: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # Others build groups of their own from the environment: accelerate, DeepSpeed.
    os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port))
    is_distributed = world_size > 1
    placement = Placement(
        rank=rank, world_size=world_size, local_rank=rank, is_distributed=is_distributed,
        loopback_port=port if is_distributed else None,
    )  # fmt: skip
    try:
        sender.send((True, work(placement, *arguments)))
    except BaseException:  # whatever it is, the parent shows it
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)
