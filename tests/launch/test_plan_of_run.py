"""A run that was started is planned as it was, and keeps what the plan says."""

import json
from pathlib import Path

import pytest

from launch.plan import main
from tests.launch.test_plan import SMALL
from trainer.notes import PLAN, read_note


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two processes."""
    import yaml

    from launch.compose import compose

    tree = compose([*SMALL, "name=kept", "mesh=fsdp", f"data.cache={tmp_path}"]).tree
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 2}))
    return tmp_path


def test_the_plan_of_a_run_is_kept_with_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"run={folder}", "device=h100", "json=true"]) == 0
    said, note = json.loads(capsys.readouterr().out), read_note(folder, PLAN)
    assert said["mesh"]["dp_shard"] == 2
    assert note == {
        "bytes": said["memory"]["by_category"],
        "peak_bytes": said["memory"]["peak"],
        "flops_per_token": said["flops_per_token"],
        "tokens": 400 * 4 * 32,
        "steps": 400,
        "tokens_per_second": said["tokens_per_second"],
        "device": "h100",
        "by": "plan",
    }
    assert sum(note["bytes"].values()) == note["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh=ddp"], "mesh=ddp has no effect"),
        (["probe=true"], "give them in place of run=DIR"),
    ],
)
def test_a_run_is_planned_as_it_was_started(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([f"run={folder}", *words])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.yaml beside an environment\.json"):
        main([f"run={tmp_path}"])
