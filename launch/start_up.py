"""What the command line does for the start of a run to be short."""

import gc
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

COMPILED = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def resting_collector() -> Iterator[None]:
    """Keep Python's garbage collector still while modules are imported, a fifth of their time.

    `trainer.start_up.wake_collector` ends its rest before anything is built.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_compiled(engine: object, environ: MutableMapping[str, str]) -> None:
    """Let compiled blocks outlive the machine's start: torch's own choice is a folder in /tmp.

    Who sets the variable has another folder; on many nodes a local one is faster than a shared one.
    A home that cannot be written to leaves torch's.
    """
    if not isinstance(engine, Mapping) or not engine.get("compile"):
        return
    folder = Path("~/.cache/tessera/compiled").expanduser()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            environ.setdefault(COMPILED, str(folder))
