"""`tessera checkpoints`: what a run has saved, and what of it is damaged."""

import json
import shutil
from pathlib import Path

import pytest

from launch.checkpoints import main
from tests.trainer.test_stored_checkpoint import STORED, TENSORS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(STORED, tmp_path / "run/checkpoints")
    return tmp_path / "run"


def test_intact_checkpoints_are_listed_with_one_hash_of_their_tensors(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"run={run}", "hash=true"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split() == ["step", "2", "intact", "0.1", "MB", "by", "1", "rank", TENSORS]


def test_damaged_checkpoint_is_named_with_its_file_and_fails_the_check(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step_00000002/state/state.json").unlink()
    assert main([f"run={run}", "json=true"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2
    assert "state.json is missing" in found["damage"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "run is missing; set run=DIR"),
        (["run=nowhere"], "run=nowhere has no checkpoint; give the folder of a run"),
        (["run=nowhere", "hash=yes"], "hash=yes is neither true nor false"),
        (["runs=nowhere"], r"unknown key runs; did you mean run\? see tessera checkpoints"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        main(words)
