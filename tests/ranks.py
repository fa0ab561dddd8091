"""Run a function on several gloo ranks in forked processes, with limits fit for tests."""

from pathlib import Path

# Slow to import: forked ranks inherit them, where each would take seconds of its own.
import datasets  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401

from trainer.data.named_sources import Source
from trainer.data.sources import StandardLibrary
from trainer.verify.forked import run_ranks

__all__ = ["COLLECTIVE_SECONDS", "cache_folder", "run_ranks"]
COLLECTIVE_SECONDS = 60.0  # below the limit of `run_ranks`: what hangs says where
StandardLibrary(Source(path="stdlib"), "data.path", None)  # listed once, too


def cache_folder(base: Path) -> Path:
    return base / "tessera-cache"
