"""Run a function on several gloo ranks in forked processes, with limits fit for tests."""

import gc
import os
import threading
from pathlib import Path

# Slow to import: forked ranks inherit them, where each would take seconds of its own.
import datasets  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
from tqdm import tqdm

from trainer.data.named_sources import Source
from trainer.data.sources import StandardLibrary
from trainer.verify.forked import run_ranks

__all__ = ["COLLECTIVE_SECONDS", "cache_folder", "run_ranks"]
COLLECTIVE_SECONDS = 60.0  # below the limit of `run_ranks`: what hangs says where
# A process group that is no more, in a cycle that nobody has collected yet: where a forked rank
# does, its destructor waits for threads that the rank has not. Nobody collects what is frozen.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
# tqdm's own lock is one with all forked processes, and stays locked by one that is killed or ends
# while its monitor holds it, every ten seconds.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
StandardLibrary(Source(path="stdlib"), "data.path", None)  # listed once, too


def cache_folder(base: Path) -> Path:
    return base / "tessera-cache"
