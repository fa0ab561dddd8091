"""50,000 steps and 500 saves leave nothing behind: memory, open files, /dev/shm, children (A32).

Shorter: `python -m tests.faults.test_endurance STEPS`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.conftest import Figure
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.callbacks.protocol import Callback, RunView
from trainer.mesh import MeshSpec
from trainer.progress import Progress
from trainer.record import read_lines

STEPS, SAVES = 50_000, 500
PAGE = os.sysconf("SC_PAGE_SIZE")
CONSTANT = ("files", "shared", "threads", "children")


class Watch(Callback):
    """Writes down, at every log point, what this rank holds of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self) -> "Watch":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.file = open(self.folder / f"{os.getpid()}.watch", "w")  # noqa: SIM115

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        line = {"step": progress.step, **held()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def held() -> dict[str, int]:
    """Return resident bytes, and counts of what a process may forget to give back."""
    tasks = Path("/proc/self/task")
    children = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return {
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE,
        "files": len(os.listdir("/proc/self/fd")),
        "shared": sum("shm" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        "threads": len(os.listdir(tasks)),
        "children": len(children),
    }


def endure(folder: Path, cache: Path, steps: int, saves: int) -> list[dict[str, Any]]:
    """Train 2 ranks; return, of each, bytes gained per step after warm-up, and the counts seen."""
    run = tiny_run(
        cache, max_steps=steps, save_every=steps // saves, log_every=max(1, steps // 500),
        mesh=MeshSpec(dp_replicate=-1), callbacks={"watch": Watch(folder)},
    )  # fmt: skip
    run_ranks(2, train, folder / "run", run, limit_seconds=3600.0)
    return [summary(read_lines(path)) for path in sorted(folder.glob("*.watch"))]


def summary(lines: list[dict[str, int]]) -> dict[str, Any]:
    """Fit a line to the memory of the last four fifths; give each count at their start and end.

    These are medians of a quarter: a file that is being read is open for a moment.
    """
    late = lines[len(lines) // 5 :]
    quarter = len(late) // 4
    slope = np.polyfit([line["step"] for line in late], [line["resident"] for line in late], 1)[0]
    return {"slope": float(slope)} | {
        name: [median(line[name] for line in part) for part in (late[:quarter], late[-quarter:])]
        for name in CONSTANT
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_thousand_steps_leave_nothing_behind(
    tmp_path: Path, cache: Path, figure: Figure
) -> None:
    before = set(os.listdir("/dev/shm"))
    ranks = endure(tmp_path, cache, STEPS, SAVES)
    assert len(ranks) == 2
    for number, found in enumerate(ranks):
        assert found["slope"] < 1024, found
        for name in CONSTANT:
            early, late = found[name]
            assert early == late, (name, found)
        figure(f"A32 memory gained in {STEPS:,} steps, rank {number}", found["slope"], "bytes/step")
    assert set(os.listdir("/dev/shm")) <= before
    figure("A32 steps and saves without a file, shared segment or child more", STEPS, "")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        steps = int(sys.argv[1])
        found = endure(Path(name), Path(name) / "cache", steps, max(1, steps // 100))
        print(json.dumps(found, indent=1))
