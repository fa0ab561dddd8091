"""Saving and resuming a real run: bitwise the same curve, on any layout, after any interruption."""

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.request import refuse
from tests.conftest import Figure, tiny_spec
from tests.ranks import run_ranks
from tests.runs import DieAt, start_in, tiny_run, train
from trainer.callbacks.protocol import Callback, RunView
from trainer.checkpoint import commit
from trainer.checkpoint.commit import committed_steps, read_manifest, step_folder
from trainer.checkpoint.parts import hashed
from trainer.checkpoint.spec import CheckpointSpec
from trainer.construct import fit
from trainer.control import StopRequest
from trainer.distributed import Placement
from trainer.errors import StorageError
from trainer.files import read_lines
from trainer.mesh import MeshSpec
from trainer.parallel.pieces import unique_parameters
from trainer.pieces import Piece
from trainer.points import METRICS
from trainer.progress import Progress
from trainer.run import Run
from trainer.verify.forked import RankFailedError

DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
HSDP = MeshSpec(dp_replicate=2, dp_shard=2)
DROPOUT = tiny_spec(attention_dropout=0.1)
MODEL, OPTIMIZER = "model/model.safetensors", "state/optimizer.safetensors"


class KeepPieces(Callback):
    """Keeps what this rank holds before the first step: (shape, start, elements) by name."""

    def build(self) -> "KeepPieces":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        def copied(pieces: dict[str, Piece]) -> dict[str, Any]:
            return {
                name: (
                    piece.shape,
                    piece.rows[0].start * piece.width,
                    piece.local.cpu().reshape(-1).numpy().copy(),
                )
                for name, piece in pieces.items()
            }

        self.step = progress.step
        self.weights = copied(view.engine.weights())
        self.optimizer = copied(view.engine.optimizer_state())


def loaded(
    placement: Placement, folder: Path, run: Run
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Start, and return (step, weights, optimizer state) as this rank loaded them."""
    kept = KeepPieces()
    fit(replace(run, callbacks={"kept": kept}), start_in(folder, placement))
    return kept.step, kept.weights, kept.optimizer


def whole(of_ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Put the ranks' pieces together; NaN where no rank holds an element."""
    tensors = {}
    for name, (shape, _, values) in of_ranks[0].items():
        flat = np.full(int(np.prod(shape, dtype=int)), np.nan, values.dtype)
        for pieces in of_ranks:
            _, start, part = pieces[name]
            flat[start : start + len(part)] = part
        tensors[name] = flat.reshape(shape)
    return tensors


def assert_equals_file(of_ranks: list[dict[str, Any]], path: Path) -> None:
    expected, found = load_file(path), whole(of_ranks)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.numpy().tobytes(), name
        assert found[name].shape == tuple(tensor.shape)


def train_until_stopped(placement: Placement, folder: Path, run: Run) -> bool:
    """Train with a stop request that the last rank alone has had from the start."""
    is_last = placement.rank == placement.world_size - 1
    return fit(run, start_in(folder, placement, StopRequest(is_set=is_last)))


def outcome(placement: Placement, folder: Path, run: Run) -> str:
    """Return the message of the StorageError that ends training, or the word `finished`."""
    try:
        assert fit(run, start_in(folder, placement))
    except StorageError as error:
        return str(error)
    return "finished"


def limited_outcome(placement: Placement, folder: Path, run: Run, max_bytes: int) -> str:
    """As `outcome`, where no file may grow beyond `max_bytes`."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    return outcome(placement, folder, run)


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return all of metrics.jsonl that depends neither on the clock nor on failed saves."""
    timed = {"time", "tokens_per_second", "data_wait_fraction", "mfu", "memory_gib"}
    lines = [line for line in read_lines(folder / METRICS) if line["split"] != "checkpoint"]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def final_bytes(folder: Path) -> dict[str, bytes]:
    """Return the newest step's tensor files, and its number."""
    newest = step_folder(folder / "checkpoints", committed_steps(folder / "checkpoints")[0])
    return {"step": newest.name.encode()} | {
        name: (newest / name).read_bytes() for name in (MODEL, OPTIMIZER)
    }


def assert_same_run(folder: Path, reference: Path) -> None:
    assert curve(folder) == curve(reference)
    assert final_bytes(folder) == final_bytes(reference)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def crash(world_size: int, folder: Path, run: Run, step: int) -> None:
    with pytest.raises(RankFailedError, match="died without a result"):
        run_ranks(world_size, train, folder, replace(run, callbacks={"die": DieAt(step)}))


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """An uninterrupted run of ten steps on one rank, saved at 3, 6, 9 and 10."""
    folder = tmp_path_factory.mktemp("ten")
    run_ranks(1, train, folder, tiny_run(cache, save_every=3))
    return folder


@pytest.fixture(scope="module")
def saved_six_steps(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("six")
    run_ranks(1, train, folder, tiny_run(cache, save_every=3, max_steps=6))
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """Runs of two steps, saved at the second, by layout."""
    folders = {}
    for name, world_size, mesh in (("DDP", 1, DDP), ("FSDP", 2, FSDP), ("HSDP", 4, HSDP)):
        folders[name] = tmp_path_factory.mktemp(name)
        run_ranks(world_size, train, folders[name], tiny_run(cache, mesh=mesh, max_steps=2))
    return folders


@pytest.fixture
def six_steps(tmp_path: Path, saved_six_steps: Path) -> Path:
    """A copy of a run of six steps on one rank, saved at 3 and 6."""
    shutil.copytree(saved_six_steps, tmp_path / "six")
    return tmp_path / "six"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    yield from mounted(tmp_path / "disk", "size=2m")


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A run whose checkpoints lie on a file system for 20 files."""
    yield from (path.parent for path in mounted(tmp_path / "run/checkpoints", "nr_inodes=20"))


def mounted(disk: Path, options: str) -> Iterator[Path]:
    """Yield a file system in memory; skip where this process may not mount one."""
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else None
    except FileNotFoundError as error:
        reason = str(error)
    if reason:
        assert "CI" not in os.environ, f"CI must be able to mount a tmpfs: {reason}"
        pytest.skip(f"cannot mount a tmpfs here: {reason}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_run_that_crashed_and_resumed_equals_an_uninterrupted_one(
    tmp_path: Path, cache: Path, ten_steps: Path
) -> None:
    run = tiny_run(cache, save_every=3)
    crash(1, tmp_path, run, 8)
    assert committed_steps(tmp_path / "checkpoints")[0] == 6
    assert len(curve(tmp_path)) == 8
    assert run_ranks(1, train, tmp_path, run) == [True]
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 11))
    assert_same_run(tmp_path, ten_steps)


@pytest.mark.parametrize(("world_size", "mesh"), [(1, DDP), (2, DDP), (2, FSDP)])
def test_dropout_and_a_log_window_that_straddles_the_save_resume_bitwise(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    """The run dies at step 8, where the window of steps 5 to 8 ends, and goes on after step 6."""
    run = tiny_run(cache, save_every=3, log_every=4, mesh=mesh, model=DROPOUT)
    run_ranks(world_size, train, tmp_path / "whole", run)
    crash(world_size, tmp_path / "parts", run, 8)
    assert committed_steps(tmp_path / "parts/checkpoints")[0] == 6
    assert run_ranks(world_size, train, tmp_path / "parts", run) == [True] * world_size
    assert [line["step"] for line in curve(tmp_path / "parts")] == [1, 4, 8, 10]
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_dropout_changes_the_curve(tmp_path: Path, cache: Path, ten_steps: Path) -> None:
    """Else the test above would not see random numbers that resume wrongly."""
    run_ranks(1, train, tmp_path, tiny_run(cache, model=DROPOUT, max_steps=1))
    assert curve(tmp_path)[0]["loss"] != curve(ten_steps)[0]["loss"]


def test_finished_run_goes_on_with_a_larger_max_steps(
    six_steps: Path, cache: Path, ten_steps: Path
) -> None:
    run_ranks(1, train, six_steps, tiny_run(cache, save_every=3))
    assert_same_run(six_steps, ten_steps)


def test_finished_run_that_is_started_again_changes_nothing(
    tmp_path: Path, cache: Path, ten_steps: Path
) -> None:
    shutil.copytree(ten_steps, tmp_path / "again")
    assert run_ranks(1, train, tmp_path / "again", tiny_run(cache, save_every=3)) == [True]
    assert_same_run(tmp_path / "again", ten_steps)
    assert names(tmp_path / "again") == names(ten_steps)


@pytest.mark.parametrize(
    ("saved", "world_size", "mesh"),
    [
        ("FSDP", 1, DDP),
        ("FSDP", 2, DDP),
        ("FSDP", 4, FSDP),
        ("HSDP", 1, DDP),
        ("DDP", 4, HSDP),
    ],
)
def test_weights_and_optimizer_load_on_another_layout(
    two_steps: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    saved: str,
    world_size: int,
    mesh: MeshSpec,
) -> None:
    """Four ranks share 258 rows of the embedding unevenly: 65, 65, 65 and 63."""
    shutil.copytree(two_steps[saved], tmp_path / "run")
    run = tiny_run(cache, mesh=mesh, max_steps=2)
    results = run_ranks(world_size, loaded, tmp_path / "run", run)
    steps, weights, optimizer = zip(*results, strict=True)
    assert set(steps) == {2}
    folder = step_folder(tmp_path / "run/checkpoints", 2)
    assert_equals_file(list(weights), folder / MODEL)
    assert_equals_file(list(optimizer), folder / OPTIMIZER)


def test_run_goes_on_along_the_same_curve_on_another_number_of_ranks(
    two_steps: dict[str, Path], tmp_path: Path, cache: Path, ten_steps: Path
) -> None:
    """Sums of gradients are added in another order: relative 1e-6 at most, in fp32."""
    shutil.copytree(two_steps["FSDP"], tmp_path / "run")
    run_ranks(4, train, tmp_path / "run", tiny_run(cache, mesh=FSDP, max_steps=4))
    run_ranks(1, train, tmp_path / "run", tiny_run(cache, max_steps=6))
    found, expected = curve(tmp_path / "run"), curve(ten_steps)[:6]
    for key in ("step", "tokens", "num_targets", "lr"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx(
        [line["loss"] for line in expected], rel=1e-6, abs=0
    )


@pytest.mark.parametrize(("world_size", "mesh"), [(1, DDP), (2, FSDP)])
def test_stop_request_of_one_rank_ends_all_after_a_save_and_the_next_start_goes_on(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    """At first the ranks ask each other before each step: nobody's data is known to be there."""
    run = tiny_run(cache, mesh=mesh, max_steps=4)
    run_ranks(world_size, train, tmp_path / "whole", run)
    parts = tmp_path / "parts"
    assert run_ranks(world_size, train_until_stopped, parts, run) == [False] * world_size
    assert names(parts) == ["latest", "step_00000001"]
    with open(parts / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "split": "tra')  # torn by the end of the process
    assert run_ranks(world_size, train, parts, run) == [True] * world_size
    assert [line["step"] for line in curve(parts)] == [1, 2, 3, 4]
    assert_same_run(parts, tmp_path / "whole")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "state/state.json", "MANIFEST.json"])
def test_damaged_newest_step_is_set_aside_and_the_older_one_is_used(
    six_steps: Path, cache: Path, saved_six_steps: Path, name: str
) -> None:
    flip(step_folder(six_steps / "checkpoints", 6) / name, -100)
    run_ranks(1, train, six_steps, tiny_run(cache, save_every=3, max_steps=6))
    assert names(six_steps) == ["latest", "step_00000003", "step_00000006", "step_00000006.bad-1"]
    assert_same_run(six_steps, saved_six_steps)


def test_strict_run_stops_at_a_damaged_newest_step_and_leaves_it(
    six_steps: Path, cache: Path
) -> None:
    flip(step_folder(six_steps / "checkpoints", 6) / MODEL, -100)
    (message,) = run_ranks(1, outcome, six_steps, tiny_run(cache, resume_strict=True))
    assert "step_00000006 is damaged, and resume_strict=true uses no older step" in message
    assert names(six_steps) == ["latest", "step_00000003", "step_00000006"]


def test_step_of_a_newer_version_is_refused_before_anything_is_renamed(
    six_steps: Path, cache: Path
) -> None:
    """Before a process starts, and by ranks that found it later; an older step may be asked for."""
    path = step_folder(six_steps / "checkpoints", 6) / "MANIFEST.json"
    body = json.loads(path.read_text()) | {"version": commit.VERSION + 1}
    del body["xxh3_of_the_above"]
    path.write_text(json.dumps(body | {"xxh3_of_the_above": commit._body_hash(body)}))
    with pytest.raises(ValueError, match="written by a newer Tessera"):
        refuse(six_steps, {"resume_step": None})
    run = tiny_run(cache, save_every=3, max_steps=6)
    with pytest.raises(RankFailedError, match="written by a newer Tessera"):
        run_ranks(2, train, six_steps, run)
    assert names(six_steps) == ["latest", "step_00000003", "step_00000006"]
    assert run_ranks(1, train, six_steps, replace(run, resume_step=3)) == [True]
    assert {"step_00000006", "step_00000006.rewound-1"} <= set(names(six_steps))


@pytest.mark.parametrize("finder", [0, 1])
def test_damage_that_one_rank_alone_sees_makes_all_ranks_use_the_older_step(
    six_steps: Path, cache: Path, finder: int
) -> None:
    """The ranks share the hashing: part number n of the manifest is rank n % 2's."""
    folder = step_folder(six_steps / "checkpoints", 6)
    files = read_manifest(folder)["files"]
    parts = [(file, ranges) for file, entry in files.items() for ranges, _ in hashed(entry)]
    file, ranges = parts[finder]
    start, _ = next(iter(ranges))
    flip(folder / file, start)
    run = tiny_run(cache, mesh=FSDP, max_steps=3)
    results = run_ranks(2, loaded, six_steps, run)
    assert [step for step, _, _ in results] == [3, 3]
    assert "step_00000006.bad-1" in names(six_steps)


def test_run_without_an_intact_step_is_refused(six_steps: Path, cache: Path) -> None:
    for step in (3, 6):
        (step_folder(six_steps / "checkpoints", step) / MODEL).unlink()
    (message,) = run_ranks(1, outcome, six_steps, tiny_run(cache))
    assert re.match(rf"none of the 2 checkpoints in {six_steps}/checkpoints is intact", message)
    assert {"step_00000003.bad-1", "step_00000006.bad-1"} <= set(names(six_steps))


def test_weight_file_that_the_manifest_does_not_list_is_never_loaded(
    six_steps: Path, cache: Path
) -> None:
    """Its bytes were never verified: it is refused or passed over."""
    folder = step_folder(six_steps / "checkpoints", 6)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / MODEL).items()}
    save_file(zeros, folder / "model/zzz.safetensors")
    ((step, weights, _),) = run_ranks(1, loaded, six_steps, tiny_run(cache, max_steps=6))
    if step == 6:
        assert_equals_file([weights], folder / MODEL)
    else:
        assert "step_00000006.bad-1" in names(six_steps)


def remove(latest: Path, outside: Path) -> None:
    latest.unlink()


def link_outside(latest: Path, outside: Path) -> None:
    latest.unlink()
    latest.symlink_to(outside)


def put_a_folder(latest: Path, outside: Path) -> None:
    latest.unlink()
    latest.mkdir()


def write(text: str) -> Callable[[Path, Path], None]:
    return lambda latest, outside: latest.write_text(text) and None


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(remove, id="missing"),
        pytest.param(write(""), id="empty"),
        pytest.param(write("\x00\xff{garbage"), id="garbage"),
        pytest.param(write("step_00000003\n"), id="older"),
        pytest.param(write("../../outside\n"), id="outside"),
        pytest.param(link_outside, id="symlink"),
        pytest.param(put_a_folder, id="folder"),
    ],
)
def test_latest_is_only_a_hint(
    request: pytest.FixtureRequest, six_steps: Path, cache: Path, ten_steps: Path,
    spoil: Callable[[Path, Path], None], figure: Figure,
) -> None:  # fmt: skip
    outside = six_steps.parent / "outside"
    outside.write_text("step_00000003\n")
    spoil(six_steps / "checkpoints/latest", outside)
    assert run_ranks(1, train, six_steps, tiny_run(cache, max_steps=7)) == [True]
    assert curve(six_steps) == curve(ten_steps)[:7]
    assert committed_steps(six_steps / "checkpoints") == [7, 6]
    assert outside.read_text() == "step_00000003\n"
    figure(f"A7 `latest` is {request.node.callspec.id}: resumed from the newest step", "yes", "")


def test_symlinked_step_is_not_resumed(six_steps: Path, cache: Path, tmp_path: Path) -> None:
    checkpoints = six_steps / "checkpoints"
    (checkpoints / "step_00000006").rename(tmp_path / "elsewhere")
    (checkpoints / "step_00000006").symlink_to(tmp_path / "elsewhere")
    ((step, _, _),) = run_ranks(1, loaded, six_steps, tiny_run(cache, max_steps=3))
    assert step == 3


def test_weights_open_as_safetensors_and_are_exactly_the_models_tensors(
    six_steps: Path, cache: Path
) -> None:
    run = tiny_run(cache, max_steps=6)
    ((_, weights, _),) = run_ranks(1, loaded, six_steps, run)
    path = step_folder(six_steps / "checkpoints", 6) / MODEL
    expected = {name: tuple(p.shape) for name, p in unique_parameters(run.plan_model())}
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in load_file(path).values())
    assert_equals_file([weights], path)


def test_split_weights_carry_the_index_of_hugging_face_and_load(
    tmp_path: Path, cache: Path
) -> None:
    run = tiny_run(cache, mesh=FSDP, checkpoint=CheckpointSpec(max_file_gb=2e-5), max_steps=1)
    run_ranks(2, train, tmp_path, run)
    folder = step_folder(tmp_path / "checkpoints", 1) / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    parts = {file: load_file(folder / file) for file in files}
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    merged = {name: tensor for part in parts.values() for name, tensor in part.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    save_file(merged, tmp_path / "merged.safetensors")
    steps, weights, _ = zip(*run_ranks(2, loaded, tmp_path, run), strict=True)
    assert set(steps) == {1}
    assert_equals_file(list(weights), tmp_path / "merged.safetensors")


def test_resume_step_goes_back_and_sets_later_steps_aside(
    six_steps: Path, cache: Path, ten_steps: Path
) -> None:
    abandoned = final_bytes(six_steps)[MODEL]
    run_ranks(1, train, six_steps, tiny_run(cache, save_every=3, resume_step=3))
    assert (six_steps / "checkpoints/step_00000006.rewound-1" / MODEL).read_bytes() == abandoned
    assert [line["step"] for line in curve(six_steps)] == list(range(1, 11))
    assert_same_run(six_steps, ten_steps)


def test_resume_step_without_a_checkpoint_is_refused(six_steps: Path, cache: Path) -> None:
    with pytest.raises(RankFailedError, match=r"resume_step=4 has no checkpoint .* \[6, 3\]"):
        run_ranks(1, train, six_steps, tiny_run(cache, resume_step=4))
    assert names(six_steps) == ["latest", "step_00000003", "step_00000006"]


def test_file_size_limit_ends_the_run_with_the_reason_and_no_debris(
    six_steps: Path, cache: Path, ten_steps: Path
) -> None:
    """It holds for the shared memory, too, which takes weights and optimizer state at once."""
    limit = (step_folder(six_steps / "checkpoints", 6) / OPTIMIZER).stat().st_size - 1
    (message,) = run_ranks(1, limited_outcome, six_steps, tiny_run(cache, max_steps=7), limit)
    assert "3 saves in a row failed" in message
    assert "for a copy of what is saved: File too large" in message
    assert names(six_steps) == ["latest", "step_00000003", "step_00000006"]
    run_ranks(1, train, six_steps, tiny_run(cache, save_every=3))
    assert_same_run(six_steps, ten_steps)


def test_run_stops_after_three_failed_saves_in_a_row(
    tmp_path: Path, cache: Path, ten_steps: Path
) -> None:
    limit = len(final_bytes(ten_steps)[OPTIMIZER]) - 1
    run = tiny_run(cache, save_every=2)
    (message,) = run_ranks(1, limited_outcome, tmp_path, run, limit)
    assert "File too large" in message
    assert [line["step"] for line in curve(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert names(tmp_path) == []


class FillDisk(Callback):
    """Lets rank 0 fill the disk, all but `leave` bytes, at the log points of the steps `full`."""

    def __init__(self, filler: Path, full: set[int], leave: int) -> None:
        self.filler, self.full, self.leave = filler, full, leave

    def build(self) -> "FillDisk":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.is_main = view.is_main

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if self.is_main:
            self.filler.unlink(missing_ok=True)
            if progress.step in self.full:
                free = shutil.disk_usage(self.filler.parent).free
                self.filler.write_bytes(bytes(max(0, free - self.leave)))


def needed_bytes(folder: Path) -> int:
    return sum(len(data) for name, data in final_bytes(folder).items() if name != "step")


@pytest.mark.parametrize(
    ("share", "complaint", "world_size", "mesh"),
    [
        (0.5, "free space", 1, DDP),
        # 1.5 times the tensors passes the check before a save; blocks of a dozen files do not fit.
        (1.5, "No space left", 2, FSDP),
    ],
)
def test_full_disk_fails_a_save_on_all_ranks_and_leaves_no_debris(
    small_disk: Path,
    cache: Path,
    ten_steps: Path,
    share: float,
    complaint: str,
    world_size: int,
    mesh: MeshSpec,
) -> None:
    leave = int(share * needed_bytes(ten_steps))
    fill = FillDisk(small_disk / "filler", full={4}, leave=leave)
    small_files = CheckpointSpec(max_file_gb=5e-6, background=False)
    run = tiny_run(cache, mesh=mesh, save_every=2, max_steps=4, checkpoint=small_files)
    folder = small_disk / "run"
    messages = run_ranks(world_size, outcome, folder, replace(run, callbacks={"fill": fill}))
    # Whichever rank met the full disk says so; the others name that rank.
    assert any(complaint in message for message in messages)
    assert all(str(folder / "checkpoints") in message for message in messages)
    assert names(folder) == ["latest", "step_00000002"]
    (small_disk / "filler").unlink()
    run_ranks(world_size, train, folder, run)
    assert names(folder) == ["latest", "step_00000002", "step_00000004"]


def test_disk_for_too_few_files_fails_a_save_before_anything_is_written(
    few_files: Path, cache: Path
) -> None:
    (message,) = run_ranks(1, outcome, few_files, tiny_run(cache, max_steps=1))
    assert re.search(r"checkpoints has room for \d+ more files, a checkpoint needs 2\d", message)
    assert names(few_files) == []


def test_run_outlives_failed_saves_that_are_not_three_in_a_row(
    small_disk: Path, cache: Path, ten_steps: Path
) -> None:
    leave = needed_bytes(ten_steps) // 2
    fill = FillDisk(small_disk / "filler", full={2, 3, 5, 6}, leave=leave)
    run = tiny_run(cache, save_every=1, callbacks={"fill": fill})
    run_ranks(1, train, small_disk / "run", run)
    assert names(small_disk / "run") == ["latest", "step_00000009", "step_00000010"]
    assert_same_run(small_disk / "run", ten_steps)


def test_masters_of_another_precision_are_refused(six_steps: Path, cache: Path) -> None:
    with pytest.raises(RankFailedError) as found:
        run_ranks(1, train, six_steps, tiny_run(cache, precision="fp64"))
    assert "is torch.float32, the run keeps torch.float64" in str(found.value)
    assert "ValueError" in str(found.value)
    assert "set model, optim and precision" in str(found.value)


def test_empty_shards_are_saved_and_loaded(tmp_path: Path, cache: Path) -> None:
    """Keys and values have 2 rows: on 4 ranks two of the shards are empty."""
    model = tiny_spec(num_key_value_heads=1, head_dim=2)
    run = tiny_run(cache, model=model, mesh=FSDP, max_steps=4)
    run_ranks(4, train, tmp_path / "whole", run)
    run_ranks(4, train, tmp_path / "parts", replace(run, max_steps=2))
    run_ranks(4, train, tmp_path / "parts", run)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    for name in (MODEL, OPTIMIZER):
        parts, whole = (
            (step_folder(tmp_path / kind / "checkpoints", 4) / name).read_bytes()
            for kind in ("parts", "whole")
        )
        assert parts == whole, name


def test_the_same_resume_step_goes_back_once_and_then_goes_on(tmp_path: Path, cache: Path) -> None:
    run = tiny_run(cache, save_every=2, max_steps=6, checkpoint=CheckpointSpec(keep=9))
    run_ranks(2, train, tmp_path, run)
    for max_steps, rewound in ((8, 2), (10, 2)):
        again = replace(run, resume_step=2, max_steps=max_steps)
        run_ranks(2, train, tmp_path, again)
        assert len(list((tmp_path / "checkpoints").glob("*.rewound-*"))) == rewound
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == list(range(1, 11))


class WrongValue(Callback):
    """A defect that shows as a ValueError in the middle of training."""

    def build(self) -> "WrongValue":
        return self

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        raise ValueError("math domain error")


def test_a_value_error_in_training_is_no_bad_config_and_frees_the_lock(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(RankFailedError, match="RuntimeError: after step 1: math domain error"):
        run_ranks(1, train, tmp_path, tiny_run(cache, callbacks={"wrong": WrongValue()}))
    assert set(json.loads((tmp_path / "lease.json").read_text())) == {"generation"}
