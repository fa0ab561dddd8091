"""What the command line does for the start of a run to be short."""

import gc
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def keep_compiled(engine: Mapping[str, Any], environ: MutableMapping[str, str]) -> None:
    """Let compiled blocks outlive the machine's start: torch's own choice is a folder in /tmp.

    Who sets the variable has another folder; on many nodes a local one is faster than a shared one.
    """
    if engine.get("compile"):
        environ.setdefault(COMPILED, str(Path("~/.cache/tessera/compiled").expanduser()))
