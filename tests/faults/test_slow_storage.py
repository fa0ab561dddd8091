"""Storage that is slow or fails while a run trains on: strace delays or fails the real fsyncs.

Run it alone with `bash tests/faults/run.sh -k slow_storage`.
"""

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Figure
from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run
from tests.trainer.test_background_saves import intact_steps, writer_processes
from trainer.callbacks.protocol import Callback, RunView
from trainer.checkpoint.spec import CheckpointSpec
from trainer.construct import fit
from trainer.distributed import Placement
from trainer.errors import StorageError
from trainer.files import read_lines
from trainer.points import METRICS
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.run import Run

SAVE_EVERY, MAX_STEPS = 300, 900
DELAY = 0.3  # seconds per fsync


@pytest.fixture(autouse=True)
def _strace() -> None:
    if shutil.which("strace") is None:
        assert "CI" not in os.environ, "CI must have strace: .ci/apt.txt"
        pytest.skip("strace is not installed")


def attach(injection: str, *processes: int) -> "subprocess.Popen[bytes]":
    """Let strace harm the fsyncs of processes and of those that they start from now on."""
    words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync"]
    pids = [word for process in processes for word in ("-p", str(process))]
    tracer = subprocess.Popen([*words, "-e", f"inject=fsync:{injection}", *pids])
    deadline = time.monotonic() + 20
    for process in processes:
        while "TracerPid:\t0" in Path(f"/proc/{process}/status").read_text():
            assert time.monotonic() < deadline, "strace did not attach"
            time.sleep(0.01)
    return tracer


class Injection(Callback):
    """Harms the writer from the first save on, and with `all_writers` those that come after it.

    Notes how long each step took, whether a save was under way, and how many folders it filled.
    """

    def __init__(self, injection: str, *, all_writers: bool = False) -> None:
        self.injection, self.all_writers = injection, all_writers
        self.tracer: subprocess.Popen[bytes] | None = None
        self.calm: list[float] = []
        self.saving: list[float] = []
        self.most_under_way = 0
        self.written: list[float] = []

    def build(self) -> "Injection":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.folder = view.folder / "checkpoints"
        self.before = time.monotonic()

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        seconds = time.monotonic() - self.before
        under_way = len(list(self.folder.glob("*.tmp-*")))
        if progress.step > 20:  # the first steps are slower
            (self.saving if under_way else self.calm).append(seconds)
        self.most_under_way = max(self.most_under_way, under_way)
        self.before = time.monotonic()

    def on_save(self, progress: Progress, saved: Saved) -> None:
        self.written.append(saved.seconds_written)
        if self.tracer is None:
            starters = [os.getpid()] if self.all_writers else []
            self.tracer = attach(self.injection, *writer_processes(), *starters)
            self.before = time.monotonic()


def injected(placement: Placement, folder: Path, run: Run, injection: Injection) -> dict[str, Any]:
    """Train, and return what happened."""
    end = "finished"
    try:
        fit(replace(run, callbacks={"injection": injection}), start_in(folder, placement))
    except StorageError as error:
        end = str(error)
    found = {key: value for key, value in vars(injection).items() if key != "tracer"}
    return found | {"end": end}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_take_as_long_while_a_slow_disk_is_written_to(
    tmp_path: Path, cache: Path, figure: Figure
) -> None:
    """Trainer and writer may share a core here: 1.5 times the 99th percentile of other steps."""
    run = tiny_run(
        cache, save_every=SAVE_EVERY, max_steps=MAX_STEPS, checkpoint=CheckpointSpec(keep=9)
    )
    injection = Injection(f"delay_enter={int(DELAY * 1e6)}")
    (found,) = run_ranks(1, injected, tmp_path, run, injection, limit_seconds=580)
    assert found["end"] == "finished"
    assert intact_steps(tmp_path) == list(range(MAX_STEPS, 0, -SAVE_EVERY))
    assert found["most_under_way"] == 1
    assert found["written"][1] > 5 * DELAY
    calm, saving = (np.percentile(found[kind], 99) for kind in ("calm", "saving"))
    figure("A26 99th percentile of step times during a save, in those of other steps",
           float(saving / calm), "x")  # fmt: skip
    assert saving <= 1.5 * calm


@pytest.mark.slow
def test_fsync_that_fails_once_costs_one_save(tmp_path: Path, cache: Path) -> None:
    run = tiny_run(cache, save_every=3, checkpoint=CheckpointSpec(keep=9))
    injection = Injection("error=EIO:when=1")
    (found,) = run_ranks(1, injected, tmp_path, run, injection)
    assert found["end"] == "finished"
    failures = [line["step"] for line in read_lines(tmp_path / METRICS) if "ckpt_failed" in line]
    assert len(failures) == 1
    assert intact_steps(tmp_path) == [step for step in (10, 9, 6, 3) if step not in failures]


@pytest.mark.slow
def test_fsync_that_always_fails_ends_the_run_after_three_saves(
    tmp_path: Path, cache: Path
) -> None:
    run = tiny_run(cache, save_every=2, checkpoint=CheckpointSpec(keep=9))
    injection = Injection("error=EIO", all_writers=True)
    (found,) = run_ranks(1, injected, tmp_path, run, injection)
    assert found["end"].startswith("3 saves in a row failed within ")
    assert "Input/output error" in found["end"]
    assert intact_steps(tmp_path) == [2]
