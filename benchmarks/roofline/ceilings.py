"""What this machine can do at most: products of matrices, and bytes from and to memory."""

import time
from collections.abc import Callable
from statistics import median

import torch

SIZE = 2048
STREAM_BYTES = 2**28  # of each of three vectors: far more than any cache
REPEATS = 7


def product_rate(dtype: torch.dtype, size: int = SIZE) -> float:
    """Return FLOP/s of the product of two square matrices, into memory that is there already."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2.0 * size**3 / fastest(lambda: torch.mm(left, right, out=out))


def memory_rate() -> float:
    """Return bytes/s of a + b -> c over vectors that no cache holds: two reads and a write."""
    first, second, out = (torch.ones(STREAM_BYTES // 4) for _ in range(3))
    return 3.0 * STREAM_BYTES / fastest(lambda: torch.add(first, second, out=out))


def fastest(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return seconds of the fastest call after one that warms up: what was possible."""
    return min(timed(call, repeats))


def typical(call: Callable[[], object], repeats: int = 3) -> float:
    """Return the median seconds of a call."""
    return median(timed(call, repeats))


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def ceilings(threads: int) -> dict[str, float]:
    """Return FLOP/s in fp32 and bf16 and bytes/s, with so many threads."""
    torch.set_num_threads(threads)
    return {
        "fp32": product_rate(torch.float32),
        "bf16": product_rate(torch.bfloat16),
        "memory": memory_rate(),
    }
