"""What a run was made with: versions, commit, hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "tessera-train", "torch", "numpy", "tokenizers", "safetensors", "datasets", "xxhash",
    "transformers", "accelerate", "deepspeed", "bitsandbytes",
)  # fmt: skip


def environment(world_size: int) -> dict[str, Any]:
    """Return plain values for environment.json. Neither argv nor environment variables: secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "world_size": world_size,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [
            torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
        ],
        "cuda": torch.version.cuda,
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that this file runs from, with `+` where it has changes."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
