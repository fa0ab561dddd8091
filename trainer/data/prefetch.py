"""Reading ahead: the next steps are made by a thread while the current one trains."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

DEPTH = 2
_POLL_SECONDS = 0.2
_JOIN_SECONDS = 1.0  # a thread that hangs in a read is left behind: it ends with the process

Item = TypeVar("Item")
Ready = queue.Queue[tuple[Item | None, BaseException | None]]


class Ahead(Iterator[Item], Generic[Item]):
    """Yields `items` in order, up to `depth` of them made in advance by one thread.

    What `items` raises is raised here, in its place. The thread ends with `close`, and is the only
    one that touches `items`. Depth is no state: what was read ahead is read again after a resume.
    """

    def __init__(self, items: Iterator[Item], depth: int = DEPTH) -> None:
        self._ready: Ready[Item] = queue.Queue(depth)
        self._next: tuple[Item | None, BaseException | None] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(items, self._ready, self._is_over), name="read ahead", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Return whether the next item is there, after waiting for it for so long at most.

        Raises what stands in its place.
        """
        deadline = time.monotonic() + seconds
        while self._next is None:  # in short waits: a signal that raises is not kept waiting
            left = deadline - time.monotonic()
            try:
                self._next = self._ready.get(timeout=max(0.0, min(left, _POLL_SECONDS)))
            except queue.Empty:
                if left <= 0:
                    return False
        error = self._next[1]
        if error is not None:
            self.close()
            raise error
        return True

    @property
    def has_spare(self) -> bool:
        """Whether the next item and the one after it are there."""
        return self._ready.qsize() + (self._next is not None) > 1

    def __next__(self) -> Item:
        if self._is_over.is_set():
            raise StopIteration
        while not self.wait(_POLL_SECONDS):
            pass
        assert self._next is not None
        (item, _), self._next = self._next, None
        assert item is not None
        return item

    def close(self) -> None:
        self._is_over.set()
        self._thread.join(_JOIN_SECONDS)


def _work(items: Iterator[Item], ready: Ready[Item], is_over: threading.Event) -> None:
    def put(item: Item | None, error: BaseException | None) -> None:
        while not is_over.is_set():
            try:
                return ready.put((item, error), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        return None

    try:
        for item in items:
            put(item, None)
            if is_over.is_set():
                return
        put(None, StopIteration())
    except BaseException as error:  # whatever it is, the reader raises it
        put(None, error)
