"""Run a function on several gloo ranks in forked processes, with limits fit for tests."""

from pathlib import Path

from trainer.verify.forked import run_ranks

__all__ = ["COLLECTIVE_SECONDS", "cache_folder", "run_ranks"]
COLLECTIVE_SECONDS = 20.0


def cache_folder(base: Path) -> Path:
    return base / "tessera-cache"
