"""A process that ends with the one that started it. Standard library only."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> bool:
    """Ask the kernel to kill this process when its parent dies; False: it is dead already.

    It is the thread that started this process whose end counts.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent
