"""Damage to a real checkpoint: every flipped bit is found, and nothing outside it is touched."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Figure
from tests.trainer.test_stored_checkpoint import STORED
from trainer.checkpoint import commit
from trainer.checkpoint.commit import MANIFEST
from trainer.checkpoint.retention import retain, set_aside
from trainer.checkpoint.writing import stage
from trainer.errors import StorageError

FLIPS = 1000


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A copy of a step that a run has saved."""
    shutil.copytree(STORED, tmp_path / "run")
    return tmp_path / "run/step_00000002"


def check(step: Path) -> None:
    """Verify a whole step, as one rank does."""
    commit.verify(step, commit.read_manifest(step), 0, 1)


def test_a_thousand_flipped_bits_are_all_found_and_their_file_is_named(
    step: Path, figure: Figure
) -> None:
    files = sorted(path for path in step.rglob("*") if path.is_file())
    generator, found = random.Random(42), 0
    for _ in range(FLIPS):
        path = generator.choice(files)
        at, bit = generator.randrange(path.stat().st_size), 1 << generator.randrange(8)
        with open(path, "r+b", buffering=0) as file:
            intact = file.read(at + 1)[at]
            file.seek(at)
            file.write(bytes([intact ^ bit]))
            with pytest.raises(StorageError) as caught:
                check(step)
            found += str(path) in str(caught.value)
            file.seek(at)
            file.write(bytes([intact]))
    check(step)  # what was found each time was the flip
    assert found == FLIPS
    figure(f"A5 flipped bits found, of {FLIPS:,}", found, "")


def link_the_weights(step: Path, outside: Path) -> None:
    (step / "model/model.safetensors").rename(outside / "weights")
    (step / "model/model.safetensors").symlink_to(outside / "weights")


def link_a_folder(step: Path, outside: Path) -> None:
    (step / "model").rename(outside / "model")
    (step / "model").symlink_to(outside / "model")


def name_a_file_outside(step: Path, outside: Path) -> None:
    (outside / "secret").write_bytes(b"secret")
    restate(step, "../../outside/secret")


def name_an_absolute_path(step: Path, outside: Path) -> None:
    (outside / "secret").write_bytes(b"secret")
    restate(step, str(outside / "secret"))


def restate(step: Path, name: str) -> None:
    """Let the manifest list one more file, with hashes that are right."""
    body = json.loads((step / MANIFEST).read_text())
    digest = commit.hash_ranges(step / name, [(0, 6)])
    body["files"][name] = {"bytes": 6, "pieces": [[0, 6, digest]]}
    write(step, body)


def write(step: Path, body: dict[str, object]) -> None:
    """Write a manifest whose own hash is right."""
    body.pop("xxh3_of_the_above")
    body["xxh3_of_the_above"] = commit._body_hash(body)
    (step / MANIFEST).write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (link_the_weights, "model.safetensors is a link"),
        (link_a_folder, "model is a link"),
        (name_a_file_outside, "which is no file of a checkpoint"),
        (name_an_absolute_path, "which is no file of a checkpoint"),
    ],
)
def test_nothing_outside_a_checkpoint_is_read_or_deleted(
    step: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], complaint: str
) -> None:
    """Though all bytes are as the manifest says."""
    outside = tmp_path / "outside"
    outside.mkdir()
    spoil(step, outside)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match=complaint):
        check(step)
    set_aside(step, "bad").rename(step)
    shutil.copytree(STORED / "step_00000002", step.with_name("step_00000003"))
    retain(step.parent, keep=1)
    assert commit.committed_steps(step.parent) == [3]
    assert not step.exists()
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_nothing_is_saved_where_a_link_stands_for_the_folder_of_checkpoints(
    step: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(step.parent)
    with pytest.raises(StorageError, match=r"is a symbolic link to .*, which is not followed"):
        stage(tmp_path / "checkpoints", "step_00000003.tmp-1-1", {"model/weights": 4})
    assert [path.name for path in step.parent.iterdir()] == [step.name]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"}, {"step": None}, {"files": []}, {"files": {"model": {}}},
        {"files": {"model": {"bytes": 1, "pieces": [[-1, 2, ""]]}}},
        {"files": {"model": {"bytes": 1, "pieces": [7]}}},
        {"files": {"model": {"bytes": 4, "runs": [[0, 1, 1, 3]], "xxh3": [""]}}},
        {"files": {"model": {"bytes": 4, "runs": [[0, 1, 2, 2]], "xxh3": [""]}}},
        {"files": {"model": {"bytes": 4, "runs": [[0, 0, 1, 4]], "xxh3": [""]}}},
        {"files": {"model": {"bytes": 4, "runs": [[-1, 1, 1, 4]], "xxh3": [""]}}},
        {"files": {"model": {"bytes": 4, "runs": [[0, 1, 1]], "xxh3": [""]}}},
    ],
)  # fmt: skip
def test_manifest_that_makes_no_sense_is_refused_though_its_hash_is_right(
    step: Path, change: dict[str, object]
) -> None:
    write(step, json.loads((step / MANIFEST).read_text()) | change)
    with pytest.raises(StorageError, match=r"MANIFEST\.json cannot be read"):
        check(step)
