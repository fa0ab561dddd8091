"""Steps whose loss or gradient is wrong: left out on every rank, told, and never trained on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.ledger import proved
from tests.conftest import Figure
from tests.faults.wrong_numbers import (
    Hashes,
    KilledOnce,
    ShiftedData,
    WrongEngine,
    nonsense_run,
)
from tests.ledgers import committed, ledger, ledgers, samples_of
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.checkpoint.commit import committed_steps, read_manifest, step_folder
from trainer.distributed import Placement
from trainer.files import read_lines
from trainer.mesh import MeshSpec
from trainer.numerics.spike import SpikeSpec
from trainer.points import METRICS
from trainer.run import Run
from trainer.schedule import Cosine
from trainer.verify.forked import RankFailedError

NAN = ["gradient_not_finite"]
FOUND: dict[str, Any] = {"z": 3.5, "alpha": 0.9, "warmup_steps": 10}


def execute(placement: Placement, folder: Path, run: Run) -> int:
    """Train as one rank, up to its exit record; return the exit code."""
    from launch.worker import execute as work

    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True, exist_ok=True)
    (attempt / "config.yaml").write_text("made: by a test\n")
    return work(run, placement, lambda _: attempt)


def flags_of(folder: Path, rank: int = 0) -> dict[int, list[str]]:
    return {line["step"]: line["flags"] for line in ledger(folder, rank) if "flags" in line}


def losses(folder: Path) -> dict[int, str]:
    lines = read_lines(folder / METRICS)
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def weights_of(folder: Path) -> dict[str, Any]:
    """Return sizes and hashes of the newest checkpoint's tensors."""
    newest = step_folder(folder / "checkpoints", committed_steps(folder / "checkpoints")[0])
    files: dict[str, Any] = read_manifest(newest)["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("mesh", [MeshSpec(dp_replicate=2), MeshSpec(dp_shard=2)])
def test_a_step_with_a_number_of_one_rank_that_is_not_finite_changes_nothing_on_any(
    tmp_path: Path, cache: Path, mesh: MeshSpec, figure: Figure
) -> None:
    engine = WrongEngine(nan_gradient=((1, 12),), infinite_loss=((0, 15),))
    run = tiny_run(
        cache, engine=engine, mesh=mesh, max_steps=17, callbacks={"hashes": Hashes(tmp_path)}
    )
    run_ranks(2, train, tmp_path / "run", run)
    for rank in range(2):
        hashes = [(tmp_path / f"{rank}.{step}").read_text() for step in range(1, 18)]
        same = [step for step in range(2, 18) if hashes[step - 1] == hashes[step - 2]]
        assert same == [12, 15]
        assert flags_of(tmp_path / "run", rank) == {12: NAN, 15: ["loss_not_finite"]}
    lines = read_lines(tmp_path / "run" / METRICS)
    assert sum(line["skipped_steps"] for line in lines) == 2
    figure("A16 steps with a number of one rank that is not finite, left out on all", "2 of 2", "")


def test_too_many_in_a_row_end_the_run_with_samples_and_documents(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = WrongEngine(nan_gradient=((1, 2), (0, 4), (1, 5), (0, 6)))
    run = tiny_run(cache, engine=engine, max_skipped_in_a_row=3, save_every=3)
    assert run_ranks(2, execute, tmp_path, run) == [70, 70]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "steps 4 to 6: gradient not finite (3 in a row; loss sum " in said
    assert ", nothing was updated; samples 24-31, 32-39, 40-47, from train[" in said
    assert f"tessera replay run={tmp_path} step=4" in said
    assert committed_steps(tmp_path / "checkpoints") == [3]


def test_stop_ends_the_run_at_the_first_spike_before_its_update(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spike = SpikeSpec(policy="stop", **FOUND)
    run = nonsense_run(cache, range(160, 168), spike=spike, max_steps=30, save_every=20)
    assert run_ranks(1, execute, tmp_path, run) == [70]
    said = capfd.readouterr().err
    assert "step 21: loss spike and gradient spike (1 in a row; loss sum " in said
    assert "samples 160-167, from train[" in said
    assert committed_steps(tmp_path / "checkpoints") == [20]


REWIND = SpikeSpec(policy="rewind", steps_back=5, max_rewinds=2, **FOUND)
BACK = {"spike": REWIND, "save_every": 10, "max_steps": 40}


def rewinding(cache: Path, **changes: Any) -> Run:
    """Return a run whose step 28 is nonsense: it goes back to step 20, and on with step 29's."""
    return nonsense_run(cache, range(27 * 8, 28 * 8), **(BACK | changes))


def test_a_rewind_passes_over_all_up_to_the_spike_and_nothing_else(
    tmp_path: Path, cache: Path
) -> None:
    run_ranks(2, train, tmp_path / "run", rewinding(cache))
    # The slow way: a run that reads other data from step 21 on, and never sees the nonsense.
    plain = tiny_run(cache, data_micro_rows=1, **BACK)
    shifted = replace(plain, data=ShiftedData(**vars(plain.data), after=20, by=8))
    run_ranks(2, train, tmp_path / "plain", shifted)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "plain")
    lines = ledgers(tmp_path / "run")
    assert flags_of(tmp_path / "run") == {28: ["loss_spike", "gradient_spike"]}
    proof, attempts = proved(tmp_path / "run")
    assert proof.holds, proof.findings
    left_out = sum(last - first for first, last in proof.passed_over)
    assert (left_out, proof.samples, attempts) == (64, 320, 2)
    surviving = committed(lines)
    gaps = {tuple(gap) for of_step in surviving.values() for line in of_step
            for gap in line.get("passed_over", ())}  # fmt: skip
    assert gaps == {(160, 224)}
    trained = samples_of([line for of_step in surviving.values() for line in of_step])
    assert trained == [*range(160), *range(224, 48 * 8)]
    proof, _ = proved(tmp_path / "run")
    assert (proof.findings, proof.passed_over) == ([], [(160, 224)])
    (note,) = [line for line in read_lines(tmp_path / "run" / METRICS) if line["split"] == "rewind"]
    assert (note["step"], note["from_step"], note["passed_over"]) == (20, 28, [160, 224])
    set_aside = [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()]
    assert not [name for name in set_aside if "00000030" in name and "rewound" in name]


@pytest.mark.parametrize("killed_at", [21, 25])
def test_a_run_killed_after_a_rewind_comes_to_the_same_on_another_number_of_ranks(
    tmp_path: Path, cache: Path, killed_at: int
) -> None:
    settings: dict[str, Any] = {"deterministic": "topology_free"}
    run_ranks(2, train, tmp_path / "one", rewinding(cache, **settings))
    run = rewinding(cache, **settings)
    killing = replace(run, callbacks={"kill": KilledOnce(killed_at, tmp_path)})
    with pytest.raises(RankFailedError):
        run_ranks(2, train, tmp_path / "two", killing)
    run_ranks(1, train, tmp_path / "two", run)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert weights_of(tmp_path / "two") == weights_of(tmp_path / "one")
    proof, _ = proved(tmp_path / "two")
    assert proof.holds, proof.findings
    assert sum(last - first for first, last in proof.passed_over) == 64


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rewind_costs_less_than_half_a_percent_of_the_last_loss(
    tmp_path: Path, cache: Path, figure: Figure
) -> None:
    """Against a run that no spike met. Both anneal to a rate of 0, so that noise averages out."""
    settings: dict[str, Any] = {
        "max_steps": 800, "eval_every": 800, "save_every": 50, "log_every": 50,
        "schedule": Cosine(warmup_steps=20, min_ratio=0.0),
        "data_global_rows": 32, "data_micro_rows": 32,  # of few, some are strange by chance
        "data_max_documents": 100, "data_eval_fraction": 0.1,
    }  # fmt: skip
    run_ranks(1, train, tmp_path / "calm", tiny_run(cache, **settings), limit_seconds=250)
    spike = SpikeSpec(policy="rewind", steps_back=5, max_rewinds=2, z=25.0, alpha=0.97,
                      warmup_steps=25)  # fmt: skip
    run = nonsense_run(cache, range(199 * 32, 200 * 32), **settings, spike=spike)
    run_ranks(1, train, tmp_path / "run", run, limit_seconds=250)
    rewinds = [line for line in read_lines(tmp_path / "run" / METRICS) if line["split"] == "rewind"]
    assert [(line["step"], line["from_step"]) for line in rewinds] == [(150, 200)]
    calm, found = (last_evaluation(tmp_path / name) for name in ("calm", "run"))
    difference = 100 * abs(found / calm - 1)
    figure("A17 held-out loss after a rewind, from that of a run without a spike", difference, "%")
    assert difference < 0.5


def last_evaluation(folder: Path) -> float:
    lines = [line for line in read_lines(folder / METRICS) if line["split"] == "eval"]
    return float(lines[-1]["loss"])


def test_a_run_that_only_rewinds_ends(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Behind each rewind, five steps of sense and one of none: too near for a newer checkpoint.
    nonsense = {*range(216, 224), *range(264, 272), *range(312, 320)}
    run = nonsense_run(cache, nonsense, **BACK)
    assert run_ranks(1, execute, tmp_path, run) == [70]
    said = capfd.readouterr().err
    assert "step 26: loss spike and gradient spike (1 in a row; loss sum " in said
    assert "The run went back to step 20 2 times already (from steps 28, 26; spike." in said
