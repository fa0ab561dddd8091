"""The demo itself, as users start it: the same losses on 1, 2 and 4 processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.record import read_lines

STEPS = 10
OPTIONS = (
    "experiment=demo",
    # The demo warms up for longer than this: its first steps do not depend on max_steps.
    f"max_steps={STEPS}",
    "log_every=1",
    "eval_every=null",
    "callbacks.ngrams=null",
    "callbacks.closing.sample_tokens=0",
)


def losses(runs: Path, cache: Path, name: str, *options: str) -> list[float]:
    command = [sys.executable, "-m", "launch", "train", *OPTIONS, *options]
    command += [f"runs={runs}", f"data.cache={cache}", f"name={name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_lines(runs / name / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.timeout(240)
def test_the_demo_gives_the_same_losses_on_every_layout_to_1e_6(
    tmp_path: Path, cache: Path
) -> None:
    expected = losses(tmp_path, cache, "one")
    assert len(expected) == STEPS
    layouts = {
        "two": ("launch.processes=2",),
        "two-sharded": ("launch.processes=2", "mesh=fsdp"),
        "four": ("launch.processes=4",),
        "four-sharded": ("launch.processes=4", "mesh=fsdp"),
    }
    for name, options in layouts.items():
        found = losses(tmp_path, cache, name, *options)
        assert found == pytest.approx(expected, rel=1e-6, abs=0), name
