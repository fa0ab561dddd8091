"""Runs with a tracker, as far as trackers see them: their folder, and what was sent of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.wandb_server import WandbServer
from trainer.directory import CONFIG
from trainer.record import RunRecord
from trainer.trackers.delivery import write_settings
from trainer.trackers.wandb import WandbTracker


def write_points(folder: Path, *steps: int, resumed_step: int = 0, factor: float = 1.0) -> None:
    """Write as a run does: losses at each step, and at even ones an evaluation."""
    record = RunRecord(folder, rank=0, data_rank=0, attempt=1, resumed_step=resumed_step)
    for step in steps:
        record.metrics(step, "train", {"loss": factor / step, "mfu": None})
        if step % 2 == 0:
            record.metrics(step, "eval", {"loss": 2 * factor / step})
    record.close()


def run_folder(folder: Path, *steps: int, tracker: Any = None) -> Path:
    """Return the folder of a run that has written its points."""
    run = folder / "tiny"
    run.mkdir()
    write_points(run, *steps)
    (run / CONFIG).write_text(yaml.safe_dump({"seed": 3, "model": {"hub_token": "abcd"}}))
    write_settings(run, {"curves": tracker or WandbTracker(project="p")})
    return run


def sync(run: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launch", "sync", f"run={run}"],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def steps_of(server: WandbServer) -> list[list[int]]:
    """Return the steps that each run of the server has."""
    return [[point["_step"] for point in points] for points in server.histories.values()]
