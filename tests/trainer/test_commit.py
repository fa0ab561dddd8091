"""The commit protocol: a step is whole or invisible, and no damage to it goes unseen."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from trainer.checkpoint import commit, writing
from trainer.checkpoint.commit import MANIFEST
from trainer.checkpoint.lock import RunLock, check_generation
from trainer.checkpoint.parts import FilePart, hashed
from trainer.checkpoint.retention import retain, set_aside
from trainer.errors import StorageError


def contents(step: int) -> dict[str, bytes]:
    """Return the files of a small checkpoint: one is empty, two are equally long."""
    generator = random.Random(step)
    return {
        "model/model.safetensors": generator.randbytes(900),
        "state/optimizer.safetensors": generator.randbytes(900),
        "state/state.json": json.dumps({"step": step}).encode(),
        "model/empty.txt": b"",
    }


def staged(parent: Path, step: int, number: int, files: dict[str, bytes]) -> Path:
    """Make the staging folder of save `number` with empty files."""
    sizes = {name: len(data) for name, data in files.items()}
    return writing.stage(parent, f"step_{step:08d}.tmp-1-{number}", sizes)


def write_files(staging: Path, files: dict[str, bytes]) -> list[FilePart]:
    """Write each file in three parts of unequal length; return them in shuffled order."""
    parts = []
    for name, data in files.items():
        borders = sorted({0, len(data) // 3, len(data) // 2, len(data)})
        for a, b in [*pairwise(borders)] or [(0, 0)]:
            parts += writing.write_parts(staging / name, name, [(a, memoryview(data[a:b]))])
    random.Random(0).shuffle(parts)
    return parts + writing.collect_parts(staging, 0)


def nothing() -> None:
    """A fence that lets everyone pass."""


def save(parent: Path, step: int, fence: Callable[[], None] = nothing) -> Path:
    """Commit `contents(step)`."""
    staging, final = staged(parent, step, 1, contents(step)), commit.step_folder(parent, step)
    pieces = write_files(staging, contents(step))
    commit.commit(staging, final, {"step": step}, pieces, fence)
    return final


def check(folder: Path) -> None:
    """Verify a whole step, as one rank does."""
    commit.verify(folder, commit.read_manifest(folder), 0, 1)


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_committed_step_verifies_and_holds_what_was_written(tmp_path: Path) -> None:
    final = save(tmp_path, 7)
    check(final)
    assert final.name == "step_00000007"
    assert commit.committed_steps(tmp_path) == [7]
    assert commit.read_manifest(final)["files"].keys() == contents(7).keys()
    for name, data in contents(7).items():
        assert (final / name).read_bytes() == data


def test_steps_are_listed_newest_first(tmp_path: Path) -> None:
    for step in (3, 12, 5):
        save(tmp_path, step)
    assert commit.committed_steps(tmp_path) == [12, 5, 3]


def test_folder_without_manifest_is_no_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / MANIFEST).unlink()
    (tmp_path / "step_00000003").mkdir()
    assert commit.committed_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "name", ["step_00000009.tmp-1", "step_00000009.bad-1", "step_9", "xstep_00000009"]
)
def test_whole_step_under_another_name_is_no_step(tmp_path: Path, name: str) -> None:
    save(tmp_path, 9).rename(tmp_path / name)
    assert commit.committed_steps(tmp_path) == []


def test_step_name_with_a_line_break_is_no_step(tmp_path: Path) -> None:
    save(tmp_path, 9).rename(tmp_path / "step_00000009\n")
    assert commit.committed_steps(tmp_path) == []


def test_symlink_to_a_step_is_no_step(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside", 5)
    (tmp_path / "run").mkdir()
    commit.step_folder(tmp_path / "run", 5).symlink_to(outside)
    assert commit.committed_steps(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ([(0, 4), (6, 10)], "bytes 4 to 6 were written never"),
        ([(2, 10)], "bytes 0 to 2 were written never"),
        ([(0, 6), (4, 10)], "bytes 6 to 4 were written twice"),
        ([(0, 10), (0, 10)], "bytes 10 to 0 were written twice"),
        ([(0, 8)], "its end was never written"),
        ([(0, 12)], "its end was never written"),
    ],
)
def test_gap_overlap_and_missing_tail_are_refused_and_leave_no_step(
    tmp_path: Path, ranges: list[tuple[int, int]], complaint: str
) -> None:
    staging = staged(tmp_path, 1, 1, {"weights": bytes(10)})
    pieces = [FilePart("weights", [(a, b)], "") for a, b in ranges]
    with pytest.raises(StorageError, match=f"^weights: {complaint}"):
        commit.commit(staging, commit.step_folder(tmp_path, 1), {"step": 1}, pieces, nothing)
    assert commit.committed_steps(tmp_path) == []


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    """300 seeded flips of one bit, each in a random file, the manifest as likely as any other."""
    final = save(tmp_path, 1)
    files = sorted(path for path in final.rglob("*") if path.is_file() and path.stat().st_size)
    generator = random.Random(42)
    hit = set()
    for _ in range(300):
        path = generator.choice(files)
        intact = path.read_bytes()
        damaged = bytearray(intact)
        damaged[generator.randrange(len(intact))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(StorageError) as caught:
            check(final)
        assert str(path) in str(caught.value)
        path.write_bytes(intact)
        hit.add(path.name)
    check(final)  # the file was restored each time: what was found was the flip
    assert hit == {"MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"}


def test_ranks_together_find_what_each_finds_alone(tmp_path: Path) -> None:
    """Every part is hashed by exactly one of the ranks that share the work."""
    final = save(tmp_path, 1)
    body = commit.read_manifest(final)
    path = final / "model/model.safetensors"
    intact = path.read_bytes()
    for ((start, _),), _ in hashed(body["files"]["model/model.safetensors"]):
        damaged = bytearray(intact)
        damaged[start] ^= 1
        path.write_bytes(damaged)
        finders = []
        for rank in range(3):
            try:
                commit.verify(final, body, rank, 3)
            except StorageError:
                finders.append(rank)
        assert len(finders) == 1
    path.write_bytes(intact)
    for rank in range(3):
        commit.verify(final, body, rank, 3)


def truncate(folder: Path) -> str:
    path = folder / "state/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "optimizer.safetensors has 899 bytes, its manifest says 900"


def extend(folder: Path) -> str:
    path = folder / "state/state.json"
    path.write_bytes(path.read_bytes() + b" ")
    return "state.json has"


def delete(folder: Path) -> str:
    (folder / "model/model.safetensors").unlink()
    return "model.safetensors is missing"


def swap(folder: Path) -> str:
    one, two = folder / "model/model.safetensors", folder / "state/optimizer.safetensors"
    one.rename(folder / "third")
    two.rename(one)
    (folder / "third").rename(two)
    return "model.safetensors is damaged between bytes 0 and 300"


def take_the_manifest_of_another_step(folder: Path) -> str:
    shutil.copyfile(save(folder.parent, 8) / MANIFEST, folder / MANIFEST)
    return "MANIFEST.json belongs to step 8"


def take_the_manifest_of_another_run(folder: Path) -> str:
    other = folder.parent / "other"
    files = contents(1234) | {"state/state.json": contents(7)["state/state.json"]}
    staging, final = staged(other, 7, 1, files), commit.step_folder(other, 7)
    pieces = write_files(staging, files)
    commit.commit(staging, final, {"step": 7}, pieces, nothing)
    shutil.copyfile(final / MANIFEST, folder / MANIFEST)
    return "model.safetensors is damaged"


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        extend,
        delete,
        swap,
        take_the_manifest_of_another_step,
        take_the_manifest_of_another_run,
    ],
)
def test_structural_damage_is_found_and_named(
    tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    final = save(tmp_path, 7)
    complaint = damage(final)
    with pytest.raises(StorageError, match=complaint):
        check(final)


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", '"text"', "{}", "\x00" * 64])
def test_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    final = save(tmp_path, 1)
    (final / MANIFEST).write_text(text)
    with pytest.raises(StorageError, match=r"MANIFEST\.json"):
        commit.read_manifest(final)


def test_manifest_of_a_newer_version_is_refused_and_is_no_damage(tmp_path: Path) -> None:
    """Whatever else it holds; but a number that was damaged is damage."""
    path = save(tmp_path, 7) / MANIFEST
    damaged = json.loads(path.read_text()) | {"version": commit.VERSION + 1}
    body = {"version": commit.VERSION + 1, "files": "otherwise"}
    path.write_text(json.dumps(body | {"xxh3_of_the_above": commit._body_hash(body)}))
    with pytest.raises(
        ValueError, match=r"written by a newer Tessera \(version 3 .* reads 2\); use"
    ):
        commit.read_manifest(path.parent)
    path.write_text(json.dumps(damaged))
    with pytest.raises(StorageError, match="is damaged: its hash"):
        commit.read_manifest(path.parent)


def test_staging_folder_is_never_a_step_and_never_used_twice(tmp_path: Path) -> None:
    staging = staged(tmp_path, 4, 2, contents(4))
    write_files(staging, contents(4))
    (staging / MANIFEST).write_text("{}")
    assert commit.committed_steps(tmp_path) == []
    with pytest.raises(FileExistsError):
        staged(tmp_path, 4, 2, contents(4))


def test_commit_whose_fence_raises_leaves_nothing_visible(tmp_path: Path) -> None:
    """The lock was taken over while this process wrote: its step must not appear."""
    parent = tmp_path / "checkpoints"
    lock = RunLock(tmp_path)
    fence = partial(check_generation, tmp_path, lock.generation)
    save(parent, 1, fence)
    lease = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(
        json.dumps(lease | {"generation": lock.generation + 1, "host": "elsewhere"})
    )
    with pytest.raises(StorageError, match=r"taken over by generation 2 \(this is 1\)"):
        save(parent, 2, fence)
    assert commit.committed_steps(parent) == [1]
    assert not commit.step_folder(parent, 2).exists()
    lock.release()


def test_renaming_onto_an_existing_step_is_refused(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in final.rglob("*") if path.is_file()}
    staging = staged(tmp_path, 1, 2, contents(99))
    pieces = write_files(staging, contents(99))
    with pytest.raises(OSError, match="not empty"):
        commit.commit(staging, final, {"step": 1}, pieces, nothing)
    assert {path: path.read_bytes() for path in final.rglob("*") if path.is_file()} == before
    check(final)


def test_existing_file_is_not_written_through_a_symlink(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (tmp_path / "weights").symlink_to(outside)
    ranges = [(0, memoryview(b"overwritten"))]
    with pytest.raises(OSError, match="symbolic links"):
        writing.write_parts(tmp_path / "weights", "weights", ranges)
    assert outside.read_bytes() == b"untouched"


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_retention_keeps_the_newest_steps(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    retain(tmp_path, keep)
    assert commit.committed_steps(tmp_path) == [10, 3, 2, 1][:keep]
    assert names(tmp_path) == {f"step_{step:08d}" for step in [10, 3, 2, 1][:keep]}
    for step in commit.committed_steps(tmp_path):
        check(commit.step_folder(tmp_path, step))


def test_retention_removes_half_deleted_steps_and_staging_but_nothing_else(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_00000001" / MANIFEST).unlink()  # died while deleting it
    shutil.rmtree(tmp_path / "step_00000001/model")
    write_files(staged(tmp_path, 4, 7, contents(4)), contents(4))
    others = {"latest", "step_00000009.bad-1", "step_00000008.rewound-2", "notes.tmp-1"}
    for name in others:
        (tmp_path / name).mkdir()
    retain(tmp_path, 2)
    assert names(tmp_path) == {"step_00000002", "step_00000003", *others}


def test_retention_never_follows_symlinks(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside", 1)
    half_deleted = save(tmp_path / "outside", 2)
    (half_deleted / MANIFEST).unlink()
    parent = tmp_path / "run"
    for step in (7, 8, 9):
        save(parent, step)
    links = {
        "step_00000001": outside,
        "step_00000002": half_deleted,
        "step_00000003.tmp-1": outside,
    }
    for name, target in links.items():
        (parent / name).symlink_to(target)
    (parent / "step_00000007/model/link").symlink_to(outside, target_is_directory=True)
    retain(parent, 1)
    assert commit.committed_steps(parent) == [9]
    assert names(parent) == {"step_00000009", *links}
    check(outside)
    assert (half_deleted / "model/model.safetensors").exists()


def test_setting_aside_frees_the_number_and_never_overwrites(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        aside = set_aside(save(tmp_path, 5), "bad")
        assert aside == tmp_path / f"step_00000005.bad-{number}"
        assert commit.committed_steps(tmp_path) == []
    assert names(tmp_path) == {f"step_00000005.bad-{number}" for number in (1, 2, 3)}
    check(save(tmp_path, 5))
