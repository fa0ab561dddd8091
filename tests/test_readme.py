"""Every command of the README works as it stands; recipes run two short steps on ten documents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Some CPUs have to emulate bf16, fifty times slower; precisions have tests of their own.
FEW = "max_steps=2 data.max_documents=10 data.row_tokens=64 precision=fp32"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and "bash tests/" not in line]


def test_the_readme_shows_the_commands_that_matter() -> None:
    text = "\n".join(commands())
    for needed in (
        "launch/demo.sh",
        "launch.processes=2",
        "mesh=fsdp",
        "torchrun",
        "launch=slurm",
        "launch=kubernetes",
        "tessera verify",
    ):
        assert needed in text


@pytest.mark.timeout(600)  # verification computes 29 layouts
@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_works(command: str, tmp_path: Path) -> None:
    is_recipe = ("train" in command and "--help" not in command) or "demo.sh" in command
    options = f" {FEW} data.cache={tmp_path}/cache" if is_recipe else ""
    if is_recipe and "kubernetes" not in command:  # there the folder is one of the pods
        options += f" runs={tmp_path}"
    if is_recipe and "demo" in command:
        options += " callbacks.closing.sample_tokens=8"
    if "verify" in command:
        options = " layouts=[fsdp_pp,zero3] steps=5"  # the matrix of layouts has tests of its own
    if "inspect" in command:
        # No rows: the data itself speaks of warnings.
        options = f" rows=0 data.max_documents=10 data.cache={tmp_path}/cache"
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command + options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stdout + done.stderr
    if is_recipe and "dry_run" not in command:
        (metrics,) = tmp_path.glob("*/metrics.jsonl")
        assert '"step": 2' in metrics.read_text()
        assert list(tmp_path.glob("*/checkpoints/step_00000002/MANIFEST.json"))
