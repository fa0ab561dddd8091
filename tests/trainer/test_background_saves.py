"""Saves beside training: what it waits for, what it hears of, and what a crash leaves."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run, train
from trainer.callbacks.protocol import Callback, RunView
from trainer.checkpoint import writer
from trainer.checkpoint.commit import committed_steps, read_manifest, step_folder, verify
from trainer.checkpoint.lock import RunLock, read_lease
from trainer.checkpoint.spec import CheckpointSpec
from trainer.construct import fit
from trainer.distributed import Placement
from trainer.errors import StorageError
from trainer.files import read_lines
from trainer.mesh import MeshSpec
from trainer.planning.apart import apart
from trainer.points import METRICS
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.run import Run
from trainer.verify.forked import RankFailedError

FSDP = MeshSpec(dp_shard=-1)


def background_run(cache: Path, **changes: Any) -> Run:
    """Ten steps, saved at 3, 6, 9 and 10 in the background."""
    settings = {"save_every": 3, "checkpoint": CheckpointSpec(keep=9)} | changes
    return tiny_run(cache, **settings)


def writer_processes() -> list[int]:
    """Return the children of this process that write checkpoints."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"trainer.checkpoint.writer" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


class Meddle(Callback):
    """Sends a signal to the idle writer of one rank once step 3 is saved: that of step 6 meets it.

    A stopped writer goes on at step 8. Notes what is committed then.
    """

    def __init__(self, sent: signal.Signals, rank: int = 0) -> None:
        self.sent, self.rank = sent, rank
        self.committed: list[int] = []
        self.saved: list[int] = []

    def build(self) -> "Meddle":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.folder = view.folder / "checkpoints"
        self.is_here = view.is_main == (self.rank == 0)

    def on_save(self, progress: Progress, saved: Saved) -> None:
        self.saved.append(saved.step)
        if saved.step == 3 and self.is_here:
            self.signal(self.sent)

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == 8:
            self.committed = committed_steps(self.folder)
            if self.is_here and self.sent == signal.SIGSTOP:
                self.at_eight()

    def at_eight(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        (process,) = writer_processes()
        os.kill(process, number)


def meddled(
    placement: Placement, folder: Path, run: Run, sent: signal.Signals, rank: int
) -> tuple[list[int], list[int]]:
    """Train, and return what was committed at step 8, and the saves that callbacks heard of."""
    meddle = Meddle(sent, rank)
    assert fit(replace(run, callbacks={"meddle": meddle}), start_in(folder, placement))
    return meddle.committed, meddle.saved


def intact_steps(folder: Path) -> list[int]:
    """Return the steps that verify, newest first; there may be no other one."""
    steps = committed_steps(folder / "checkpoints")
    for step in steps:
        found = step_folder(folder / "checkpoints", step)
        verify(found, read_manifest(found), 0, 1)
    names = {f"step_{step:08d}" for step in steps} | {"latest"}
    assert names == {path.name for path in (folder / "checkpoints").iterdir()}
    return steps


def tensors(folder: Path) -> list[bytes]:
    newest = step_folder(folder / "checkpoints", committed_steps(folder / "checkpoints")[0])
    return [path.read_bytes() for path in sorted(newest.rglob("*.safetensors"))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, cache: Path, world_size: int
) -> None:
    """The writer of one rank is stopped before the save of step 6, up to step 8."""
    run = background_run(cache, mesh=FSDP)
    results = run_ranks(world_size, meddled, tmp_path, run, signal.SIGSTOP, world_size - 1)
    assert results == [([3], [3, 6, 9, 10])] * world_size
    assert intact_steps(tmp_path) == [10, 9, 6, 3]
    run_ranks(world_size, train, tmp_path / "waiting", tiny_run(cache, mesh=FSDP))
    assert tensors(tmp_path) == tensors(tmp_path / "waiting")


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_writer_that_dies_fails_one_save_on_all_ranks_and_the_next_one_is_good(
    tmp_path: Path, cache: Path, world_size: int, rank: int
) -> None:
    run = background_run(cache, mesh=FSDP)
    results = run_ranks(world_size, meddled, tmp_path, run, signal.SIGKILL, rank)
    assert [saved for _, saved in results] == [[3, 9, 10]] * world_size
    assert intact_steps(tmp_path) == [10, 9, 3]
    failures = [line for line in read_lines(tmp_path / METRICS) if "ckpt_failed" in line]
    assert [(line["step"], line["in_a_row"]) for line in failures] == [(6, 1)]


def ended(placement: Placement, folder: Path, run: Run) -> str:
    try:
        fit(run, start_in(folder, placement))
    except StorageError as error:
        return str(error)
    return "finished"


def test_three_background_saves_that_fail_in_a_row_end_the_run(tmp_path: Path, cache: Path) -> None:
    """A file stands where the folder of checkpoints should."""
    (tmp_path / "checkpoints").write_text("")
    (message,) = run_ranks(1, ended, tmp_path, background_run(cache, save_every=2))
    assert message.startswith("3 saves in a row failed within 0 minutes, the last one: ")
    assert str(tmp_path / "checkpoints") in message
    assert "File exists" in message
    assert [line["step"] for line in read_lines(tmp_path / METRICS) if "loss" in line][-1] == 6


class Die(Meddle):
    """Ends the rank while the save of step 6 is held."""

    def at_eight(self) -> None:
        (process,) = writer_processes()
        (self.folder.parent / "pid").write_text(str(process))
        os._exit(9)


class Break(Meddle):
    """Raises while the save of step 6 is held."""

    def at_eight(self) -> None:
        raise ArithmeticError("broken on purpose")


def test_killed_rank_takes_its_writer_with_it_and_frees_the_lock(
    tmp_path: Path, cache: Path
) -> None:
    run = background_run(cache, callbacks={"die": Die(signal.SIGSTOP)})
    with pytest.raises(RankFailedError, match="died without a result"):
        run_ranks(1, train, tmp_path, run)
    lock = RunLock(tmp_path)  # waits for the writer, which holds it, too
    command = Path("/proc", (tmp_path / "pid").read_text(), "cmdline")
    assert not command.exists() or command.read_bytes() == b""  # nobody may have waited for it
    lock.release()
    assert committed_steps(tmp_path / "checkpoints") == [3]
    run_ranks(1, train, tmp_path, background_run(cache))
    assert intact_steps(tmp_path) == [10, 9, 6, 3]


class Fence(Meddle):
    """Another host takes the run over while the save of step 6 is held."""

    def at_eight(self) -> None:
        path = self.folder.parent / "lease.json"
        path.write_text(json.dumps(read_lease(path.parent) | {"generation": 7, "host": "other"}))
        super().at_eight()


def test_save_of_a_run_that_was_taken_over_is_not_committed(tmp_path: Path, cache: Path) -> None:
    run = background_run(cache, callbacks={"fence": Fence(signal.SIGSTOP)})
    (message,) = run_ranks(1, ended, tmp_path, run)
    assert "was taken over by generation 7 (this is 1); nothing was committed" in message
    assert intact_steps(tmp_path) == [3]


def test_error_in_training_frees_the_lock_while_a_save_goes_on(tmp_path: Path, cache: Path) -> None:
    run = background_run(cache, callbacks={"break": Break(signal.SIGSTOP)})
    with pytest.raises(RankFailedError, match="broken on purpose"):
        run_ranks(1, train, tmp_path, run)
    RunLock(tmp_path).release()
    assert committed_steps(tmp_path / "checkpoints") == [3]


def answer_within_a_limit(folder: Path) -> writer.Result:
    """Answer a job of 8 kB where files may have 1 kB."""
    memory = os.memfd_create("part")
    os.truncate(memory, 8000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    lead = writer.Commit(
        sizes={"model/weights": 0}, facts={}, num_others=0, run=str(folder), generation=1, keep=1,
        best_step=None,
    )  # fmt: skip
    job = writer.Job(
        parent=str(folder), staging="step_00000001.tmp-1-1", step=1, rank=0, num_bytes=8000,
        ranges={"model/weights": [(0, 0, 900), (900, 900, 8000)]}, appended=[], commit=lead,
    )  # fmt: skip
    return writer.answer(job, memory)


def test_a_write_that_fails_is_told_with_its_file(tmp_path: Path) -> None:
    """The memory that is read is not closed while the error holds slices of it."""
    found = apart(answer_within_a_limit, tmp_path)
    assert "step_00000001.tmp-1-1/model/weights: File too large" in found.error
