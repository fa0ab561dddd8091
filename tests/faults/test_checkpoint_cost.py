"""What checkpoints cost: the pause of a save in the background, and the checks before a load.

Run it alone, on a quiet machine: `bash tests/faults/run.sh -k checkpoint_cost`.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Figure, tiny_spec
from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run
from trainer.callbacks.protocol import Callback
from trainer.checkpoint import commit, writing
from trainer.checkpoint.spec import CheckpointSpec
from trainer.construct import fit
from trainer.distributed import Placement
from trainer.mesh import MeshSpec
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.run import Run
from trainer.time_limit import TimeLimit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

INTERVAL_SECONDS = 20.0
"""Saves are rarely as near to each other; `checkpoint.interval=auto` begins with ten minutes."""
GIB = 1 << 30


class Saves(Callback):
    """Notes when each save had ended, and what training waited for it."""

    def __init__(self) -> None:
        self.saves: list[tuple[float, float]] = []

    def build(self) -> "Saves":
        return self

    def on_save(self, progress: Progress, saved: Saved) -> None:
        assert saved.folder is not None
        self.saves.append((time.monotonic(), saved.seconds_paused))
        files = commit.read_manifest(saved.folder)["files"].values()
        self.num_bytes = sum(entry["bytes"] for entry in files)


def saves_of(placement: Placement, folder: Path, run: Run) -> dict[str, Any]:
    noted = Saves()
    start = replace(start_in(folder, placement), limit=TimeLimit(5.5 * INTERVAL_SECONDS))
    fit(replace(run, callbacks={"saves": noted}), start)
    return vars(noted)


def test_saves_in_the_background_hold_training_up_for_less_than_a_hundredth_of_their_interval(
    tmp_path: Path, cache: Path, figure: Figure
) -> None:
    """13 M parameters with AdamW: 0.15 GB, one half by each of two ranks, every 20 seconds."""
    model = tiny_spec(hidden_size=384, intermediate_size=1024, num_hidden_layers=8)
    interval = CheckpointSpec(interval=INTERVAL_SECONDS)
    run = tiny_run(
        cache, model=model, mesh=MeshSpec(dp_shard=2), checkpoint=interval,
        max_steps=10**6, log_every=10,
    )  # fmt: skip
    found = run_ranks(2, saves_of, tmp_path, run, limit_seconds=500)
    for rank in found:
        assert rank["num_bytes"] > 1.2e8
        (_, *pauses) = [pause for _, pause in rank["saves"]]  # the first one maps the memory
        assert len(pauses) >= 3
    share = 100 * max(pause for rank in found for _, pause in rank["saves"][1:]) / INTERVAL_SECONDS
    size = found[0]["num_bytes"] / 1e9
    figure(f"A26 longest pause for a save of {size:.2f} GB, of an interval of 20 s", share, "%")
    assert share < 1.0


def test_a_checkpoint_is_verified_at_two_gib_a_second(tmp_path: Path, figure: Figure) -> None:
    data = memoryview(os.urandom(1 << 26))
    name = "model/model.safetensors"
    staging = writing.stage(tmp_path, "step_00000001.tmp-1-1", {name: GIB})
    ranges = [(start, data) for start in range(0, GIB, len(data))]
    parts = writing.write_parts(staging / name, name, ranges)
    final = commit.step_folder(tmp_path, 1)
    commit.commit(staging, final, {"step": 1}, parts, lambda: None)
    body = commit.read_manifest(final)
    rates = []
    for _ in range(5):  # from the page cache: the disk is not what is measured
        started = time.process_time()
        commit.verify(final, body, 0, 1)
        rates.append(1 / (time.process_time() - started))
    rate = sorted(rates)[len(rates) // 2]
    figure("A5 verifying a checkpoint before its load, one core", rate, "GiB/s")
    assert rate >= 2.0
