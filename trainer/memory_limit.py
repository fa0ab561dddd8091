"""A limit on memory for work on what comes from elsewhere: what a file asks for has an end."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATM = Path("/proc/self/statm")  # Linux; other systems do not hold RLIMIT_AS either
_lock = threading.Lock()


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Let this process take `num_bytes` more of address space, and raise MemoryError beyond.

    The limit holds for all threads: it is for short work, one piece at a time.
    """
    if not _STATM.exists():
        yield
        return
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = int(_STATM.read_text().split()[0]) * resource.getpagesize()
        limits = [x for x in (soft, hard, size + num_bytes) if x != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
