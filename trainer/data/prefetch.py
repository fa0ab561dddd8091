"""Reading ahead: the next steps are made by a thread while the current one trains."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

DEPTH = 2
_POLL_SECONDS = 0.2

Item = TypeVar("Item")


def ahead(items: Iterator[Item], depth: int = DEPTH) -> Generator[Item, None, None]:
    """Yield `items` in order, up to `depth` of them made in advance by one thread.

    What `items` raises is raised here, in its place. The thread ends with this generator, and is
    the only one that touches `items`. Depth is no state: what was read ahead is read again after a
    resume.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    is_over = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not is_over.is_set():
            try:
                return ready.put((item, error), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        return None

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if is_over.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # whatever it is, the reader raises it
            put(None, error)

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        is_over.set()
        thread.join()
