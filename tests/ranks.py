"""Run a function on several gloo ranks in forked processes: 0.06 s to start, a limit on time."""

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.supervisor import free_port
from trainer.distributed import Placement

LIMIT_SECONDS = 60.0
COLLECTIVE_SECONDS = 20.0


def cache_folder(base: Path) -> Path:
    return base / "tessera-cache"


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return `work(placement, *arguments)` of every rank; raise the first failure with its rank.

    `work` opens its own `Ranks(placement, COLLECTIVE_SECONDS)`. Results must be picklable.
    """
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
        outcomes = [_receive(rank, pipe[0]) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [
        f"rank {rank} failed:\n{v}" for rank, (is_fine, v) in enumerate(outcomes) if not is_fine
    ]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in outcomes]


def _receive(rank: int, receiver: Any) -> tuple[bool, Any]:
    try:
        if not receiver.poll(LIMIT_SECONDS):
            return False, f"no result within {LIMIT_SECONDS} s"
        outcome: tuple[bool, Any] = receiver.recv()
    except EOFError:
        return False, "died without a result"
    return outcome


def _child(
    rank: int,
    world_size: int,
    port: int,
    sender: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    placement = Placement(
        rank=rank, world_size=world_size, local_rank=rank, is_distributed=world_size > 1
    )
    try:
        sender.send((True, work(placement, *arguments)))
    except BaseException:  # whatever it is, the parent shows it
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)
