"""A run saved on 4 ranks goes on with 1, 2, 3 or 4 of them (A14); no other number is legal.

A short form for every commit: tests/distributed/test_topology_free.py and tests/trainer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.ledger import proved
from tests.conftest import Figure
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from tests.trainer.test_checkpoints import MODEL, OPTIMIZER, assert_equals_file, loaded
from trainer.checkpoint.commit import step_folder
from trainer.files import read_lines
from trainer.mesh import MeshSpec
from trainer.points import METRICS
from trainer.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS, SAVED = 500, 250
MICRO_BATCHES = 24
LIMIT = {"limit_seconds": 600.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache apart: other tests look into the common one."""
    return tmp_path_factory.mktemp("tokens")


def run_of(cache: Path, mode: str, **changes: Any) -> Run:
    settings = {
        "deterministic": mode, "mesh": MeshSpec(dp_shard=-1), "data_global_rows": MICRO_BATCHES,
        "data_micro_rows": 1, "max_steps": STEPS, "log_every": 1,
    }  # fmt: skip
    return tiny_run(cache, **(settings | changes))


def saved_by_four(folder: Path, run: Run) -> Path:
    """Train on 4 ranks up to the step that the others go on from."""
    run_ranks(4, train, folder, replace(run, max_steps=SAVED), **LIMIT)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / METRICS) if line["split"] == "train"]


def gone_on(saved: Path, folder: Path, run: Run, ranks: int) -> list[float]:
    """Go on with a copy of a run; return its curve, once its ledger is proved."""
    import shutil

    shutil.copytree(saved, folder)
    pieces = run_ranks(ranks, loaded, folder, replace(run, max_steps=SAVED), **LIMIT)
    steps, weights, optimizer = zip(*pieces, strict=True)
    assert set(steps) == {SAVED}
    assert_equals_file(list(weights), step_folder(folder / "checkpoints", SAVED) / MODEL)
    assert_equals_file(list(optimizer), step_folder(folder / "checkpoints", SAVED) / OPTIMIZER)
    run_ranks(ranks, train, folder, run, **LIMIT)
    for attempt in (folder / "attempts").iterdir():  # a run in a test has no config of its own
        (attempt / "config.yaml").write_text(yaml.safe_dump({"deterministic": run.deterministic}))
    proof, _ = proved(folder)
    assert proof.findings == []
    assert (proof.samples, proof.last_step) == (STEPS * MICRO_BATCHES, STEPS)
    return losses(folder)


def test_one_two_and_four_ranks_go_on_bitwise_with_what_four_saved(
    tmp_path: Path, cache: Path, figure: Figure
) -> None:
    run = run_of(cache, "topology_free")
    run_ranks(4, train, tmp_path / "whole", run, **LIMIT)
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS
    saved = saved_by_four(tmp_path / "saved", run)
    for ranks in (1, 2, 4):
        assert gone_on(saved, tmp_path / str(ranks), run, ranks) == expected, ranks
    figure("A14 steps bitwise equal on 1, 2 and 4 ranks, saved by 4", STEPS, "")


def test_three_ranks_go_on_with_what_four_saved_along_the_same_curve(
    tmp_path: Path, cache: Path, figure: Figure
) -> None:
    run = run_of(cache, "off")
    saved = saved_by_four(tmp_path / "saved", run)
    expected = gone_on(saved, tmp_path / "4", run, 4)
    found = gone_on(saved, tmp_path / "3", run, 3)
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    assert worst <= 1e-4
    figure("A14 largest relative difference of the loss, 3 ranks in place of 4", worst, "")


def test_five_ranks_are_refused_with_the_numbers_that_are_legal(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"5 .*(1, 2, 3, 4, 6, 8)"):
        run_of(cache, "off").check(5)
