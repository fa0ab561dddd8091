"""`tessera ledger`: the proof of a real run that died and went on, and of one that was altered."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.exit_codes import BAD_CONFIG, CHECK_FAILED, FINISHED
from tests.ranks import run_ranks
from tests.runs import DieAt, tiny_run, train
from trainer.mesh import MeshSpec
from trainer.verify.forked import RankFailedError


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Two ranks that die at step 5 with a checkpoint of step 3, then four, bitwise the same."""
    folder = tmp_path_factory.mktemp("ledger") / "run"
    run = tiny_run(
        cache, save_every=3, max_steps=6, data_micro_rows=1, mesh=MeshSpec(dp_shard=-1),
        deterministic="topology_free",
    )  # fmt: skip
    with pytest.raises(RankFailedError, match="died without a result"):
        run_ranks(2, train, folder, replace(run, callbacks={"die": DieAt(5)}))
    run_ranks(4, train, folder, run)
    set_config(folder, deterministic="topology_free", mesh={"dp_shard": -1})
    return folder


def set_config(folder: Path, **config: Any) -> None:
    for attempt in (folder / "attempts").iterdir():
        (attempt / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def run(died: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(died, tmp_path / "run"))


def altered(run: Path, attempt: int, step: int, **changes: Any) -> None:
    """Change what every rank wrote of a step."""
    for file in (run / "ledger").iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if (line["attempt"], line["step"]) == (attempt, step):
                line.update(changes)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_run_that_died_and_went_on_with_more_ranks_is_proved(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ledger", f"run={run}", "json=true"]) == FINISHED
    found = json.loads(capsys.readouterr().out)
    assert found.pop("reexecuted") == found.pop("compared") == 1  # 4; 5 was not yet written down
    assert found == {
        "last_step": 6, "samples": 48, "end": 48, "passed_over": [], "lost": 0, "doubled": 0,
        "mismatched": 0, "contradictions": 0, "findings": [], "attempts": 2, "holds": True,
        "mixtures": 1, "by_source": {},
    }  # fmt: skip
    assert main(["ledger", f"run={run}"]) == FINISHED
    assert "every sample exactly once" in capsys.readouterr().out


def test_another_loss_of_a_step_that_was_executed_again_fails_where_it_was_promised(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered(run, 1, 4, loss_sum=(1.25).hex())
    assert main(["ledger", f"run={run}"]) == CHECK_FAILED
    said = capsys.readouterr().out
    assert "step 4: attempt 1 had the numbers ('0x1.4000000000000p+0'," in said
    assert said.endswith("NOT exactly once\n")
    set_config(run, deterministic="off")
    assert main(["ledger", f"run={run}"]) == FINISHED
    assert "1 steps executed again, 0 of them compared in every bit" in capsys.readouterr().out


def test_other_samples_of_a_step_that_was_executed_again_fail_unless_the_config_changed(
    run: Path,
) -> None:
    set_config(run, deterministic="off")
    altered(run, 1, 4, samples=[[100, 102]])
    assert main(["ledger", f"run={run}"]) == CHECK_FAILED
    (run / "attempts/002/config.yaml").write_text("seed: 3\n")
    assert main(["ledger", f"run={run}"]) == FINISHED


def test_checkpoint_that_stands_elsewhere_than_the_ledger_is_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints/step_00000006/state/state.json"
    state = json.loads(path.read_text())
    state["data"]["global_sample"] = 56
    path.write_text(json.dumps(state))
    assert main(["ledger", f"run={run}"]) == CHECK_FAILED
    assert "its checkpoint goes on with sample 56, the ledger with 48" in capsys.readouterr().out


def test_ledger_of_a_run_whose_checkpoints_are_gone_is_proved_up_to_a_step_that_is_given(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    assert main(["ledger", f"run={run}"]) == BAD_CONFIG
    assert "no step of it survives; say with step=N" in capsys.readouterr().err
    assert main(["ledger", f"run={run}", "step=6"]) == FINISHED
    assert main(["ledger", f"run={run}", "step=7"]) == CHECK_FAILED
    assert "step 7: no rank wrote it down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run is missing; set run=DIR, see tessera ledger --help"),
        (["run=nowhere"], "nowhere holds no ledger; give the folder of a run"),
        (
            ["run=nowhere", "stop=3"],
            "unknown key stop; did you mean step? see tessera ledger --help",
        ),
        (["run=nowhere", "json=yes"], "json=yes is neither true nor false"),
    ],
)
def test_words_that_make_no_sense_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ledger", *words]) == BAD_CONFIG
    assert message in capsys.readouterr().err
