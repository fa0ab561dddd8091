"""Commands that fork end well on a machine with a GPU: no fork of theirs wakes it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA GPU"
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words",
    [
        "verify experiment=demo steps=5 layouts=[ddp,fsdp]",
        "plan experiment=demo",
        "plan experiment=demo mesh=auto processes=2",
        "plan experiment=demo device=h100 engine.offload_optimizer=true",
    ],
)
def test_a_command_that_forks_ends_well(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
