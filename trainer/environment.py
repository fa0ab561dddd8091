"""What a run was made with: versions, commit, hardware."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trainer.code_version import git_commit

_PACKAGES = (
    "tessera-train", "torch", "numpy", "tokenizers", "safetensors", "datasets", "xxhash",
    "transformers", "accelerate", "deepspeed", "bitsandbytes", "torchao",
)  # fmt: skip


def environment(world_size: int) -> dict[str, Any]:
    """Return plain values for environment.json. Neither argv nor environment variables: secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "git_commit": git_commit(),
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
