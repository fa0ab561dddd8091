"""Does the C library keep what a step frees on a CPU, for the next step?

Left alone, glibc maps every large tensor from the kernel and unmaps it when it is freed: 200,000
page faults in a step of a 40 M-parameter model, about 5 % of its time. Standard library only.
"""

import ctypes
import os
from collections.abc import Mapping, MutableMapping

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OWN_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_",
)  # fmt: skip
TUNABLES = "GLIBC_TUNABLES"
KERNELS, MOST_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128"


def keep_freed_memory(device_type: str, environ: Mapping[str, str]) -> bool:
    """Let freed memory stay with this process; return whether it does from now on.

    It does not where the user has set glibc's allocator, with another C library (musl, macOS), and
    on a GPU, whose tensors torch keeps itself. With another allocator preloaded it is without
    effect.
    """
    if device_type != "cpu" or not _has_glibc() or _is_set(environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # No block is mapped alone, and none goes back (-1: whatever lies free at the heap's end).
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def keep_few_kernels(device_type: str, environ: MutableMapping[str, str]) -> None:
    """Bound what oneDNN, and torch around it, keep of products in bf16; users' numbers stay.

    For each new shape they compile a kernel, and keep 1,024 of them: with documents of all lengths
    a process grew by 3 MB a step. To be said before the first product.
    """
    if device_type == "cpu":
        for name in KERNELS:
            environ.setdefault(name, MOST_KERNELS)


def _has_glibc() -> bool:
    name = "CS_GNU_LIBC_VERSION"  # macOS has no such name, musl no value
    return name in os.confstr_names and bool(os.confstr(name))


def _is_set(environ: Mapping[str, str]) -> bool:
    return "glibc.malloc." in environ.get(TUNABLES, "") or any(
        name in environ for name in OWN_SETTINGS
    )
