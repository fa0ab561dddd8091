"""Work in a process of its own, whose traces in torch end with it."""

import multiprocessing as mp
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def apart(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what `work` returns in a forked process, or raise what it raises; both are pickled.

    torch remembers layouts by the shape of their mesh: with a process group that is none taken for
    the real one of the same shape, gradients would not be summed. (FSDP2 on two ranks, torch 2.13.)
    """
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, work, arguments, options))
    process.start()
    sender.close()
    try:
        is_fine, value = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"counting ended with code {process.exitcode} and no result") from None
    finally:
        process.join()
    if not is_fine:
        raise value
    return value


def _answer(
    sender: Connection, work: Callable[..., Any], arguments: Any, options: dict[str, Any]
) -> None:
    # CUDA cannot be used in a fork of a process that has seen a GPU: torch would try to, as
    # AdamW looks whether its step is being captured. (torch 2.13.)
    torch.cuda.is_available = lambda: False
    try:
        answer = (True, work(*arguments, **options))
    except Exception as error:
        answer = (False, error)
    sender.send(answer)
