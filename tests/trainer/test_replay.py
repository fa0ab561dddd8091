"""`tessera replay`: the step comes out again, and each document has its own loss."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from launch.determinism import VARIABLES
from models.nn.head import IGNORED
from tests.faults.test_wrong_numbers import REWIND
from tests.faults.wrong_numbers import nonsense_run
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train, train_words
from tests.texts import texts_in
from tests.trainer.test_ledger_proof import lived, write
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.mesh import MeshSpec
from trainer.replay import Replayed, recorded_step, replay, told_apart
from trainer.run import Run

SAVED = {"save_every": 4, "max_steps": 10}


def replayed(_: Placement, run: Any, folder: Path, step: int) -> Replayed:
    return replay(run, folder, step)


def again(run: Any, folder: Path, step: int) -> Replayed:
    """Replay in a process of its own, as the command does."""
    found: Replayed = run_ranks(1, replayed, replace(run, mesh=MeshSpec()), folder, step)[0]
    return found


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("step", "start"), [(3, 0), (9, 8), (10, 8)])
def test_a_step_of_one_process_comes_out_in_every_bit_and_nothing_is_written(
    tmp_path: Path, cache: Path, step: int, start: int
) -> None:
    run = tiny_run(cache, **SAVED)
    run_ranks(1, train, tmp_path, run)
    before = snapshot(tmp_path)
    found = again(run, tmp_path, step)
    assert snapshot(tmp_path) == before
    assert found.start == start
    assert found.is_same_bits
    assert found.is_reproduced
    assert sum(one.loss_sum for one in found.documents) == pytest.approx(found.loss_sum, rel=1e-6)
    assert sum(one.num_targets for one in found.documents) == found.num_targets
    assert all(one.place.startswith("train[") for one in found.documents)


def test_a_step_of_two_ranks_comes_out_but_for_rounding_and_other_weights_are_noticed(
    tmp_path: Path, cache: Path
) -> None:
    run = tiny_run(cache, data_micro_rows=1, **SAVED)
    run_ranks(2, train, tmp_path, run)
    found = again(run, tmp_path, 9)
    assert found.is_reproduced
    assert found.difference < 1e-6
    other = again(replace(run, max_steps=12, optim=replace(run.optim, lr=0.1)), tmp_path, 8)
    assert not other.is_reproduced


def test_a_step_behind_a_rewind_is_replayed_with_the_data_that_it_had(
    tmp_path: Path, cache: Path
) -> None:
    run = nonsense_run(cache, range(216, 224), spike=REWIND, save_every=10, max_steps=30)
    run_ranks(1, train, tmp_path, run)
    found = again(run, tmp_path, 22)
    assert found.samples == range(232, 240)
    assert found.is_same_bits


def test_the_recorded_step_is_of_the_history_that_survived(tmp_path: Path) -> None:
    objects = lived((1, 2, range(1, 9)), (1, 1, range(4, 8)), (2, 1, range(6, 7)))
    for each in objects[0][-5:]:  # from the second life on with other losses
        each["loss_sum"] = (each["step"] + 0.5).hex()
    write(tmp_path, objects)
    step_3, step_5, step_6 = (recorded_step(tmp_path, step) for step in (3, 5, 6))
    assert (step_3.attempt, step_3.loss_sum, step_3.num_shares) == (1, 3.0, 2)
    assert (step_5.attempt, step_5.loss_sum, step_5.num_shares) == (1, 5.5, 1)
    assert (step_6.attempt, step_6.samples) == (2, list(range(40, 48)))
    with pytest.raises(ValueError, match=r"step=8 .* or was undone; set it to 1 to 6"):
        recorded_step(tmp_path, 8)


def losses_of(placement: Placement, run: Run) -> tuple[list[float], list[float]]:
    """Return the losses of a step's documents by the step itself, and one by one."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    engine = build_engine(run, run.trained_model(), ranks, MeshSpec().build(ranks=ranks))
    tokenizer = run.data.tokenizer("byte", run.model.vocab_size)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=0, rank=0, num_ranks=1)
    step = loader.step(3)
    batches = told_apart(step, None)
    alone = []
    for batch in batches:
        assert batch.sources is not None
        for number in sorted(set(batch.sources.flatten().tolist())):
            labels = torch.where(batch.sources == number, batch.labels, IGNORED)
            only = replace(batch, labels=labels, sources=None, num_sources=0)
            alone.append(float(engine.eval_step(only).sum))
    found = engine.train_step(4, batches, step.num_tokens).by_source[0].tolist()
    return found, alone


def test_told_apart_each_document_has_the_loss_that_it_has_alone(
    tmp_path: Path, cache: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    lengths = range(40, 400, 3)
    texts.write_text("".join(json.dumps({"text": f"{n:x} " * (n // 4)}) + "\n" for n in lengths))
    run = tiny_run(
        cache, precision="fp64", data_row_tokens=256, data_path=str(texts), data_max_documents=None
    )
    found, alone = run_ranks(1, losses_of, run)[0]
    assert len(found) > run.data.global_rows  # rows of several documents, too
    assert found == pytest.approx(alone, rel=1e-9)


def command(_: Placement, words: list[str]) -> int:
    return main(words)


def words_of(cache: Path, *more: str) -> list[str]:
    return [
        "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=2",
        "model.num_attention_heads=2", "model.num_key_value_heads=1", "data.row_tokens=32",
        f"data.path={texts_in(cache)}", "data.max_documents=10", "data.global_rows=4",
        f"data.cache={cache}",
        "data.micro_rows=null", "tokenizer=byte", "precision=fp32", "max_steps=4",
        "eval_every=null", "callbacks.console=null", "callbacks.closing=null", *more,
    ]  # fmt: skip


def environment_of(_: Placement, words: list[str]) -> dict[str, str]:
    """Return what the command leaves in the environment of a process without it."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    assert main(words) == 0
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_the_command_sets_what_the_same_bits_need_of_the_environment(
    tmp_path: Path, cache: Path
) -> None:
    for deterministic, expected in (("off", set()), ("run", set(VARIABLES))):
        folder = tmp_path / deterministic
        run_ranks(1, train_words, folder, words_of(cache, f"deterministic={deterministic}"))
        found = run_ranks(1, environment_of, ["replay", f"run={folder}", "step=2"])[0]
        assert set(found) == expected


def test_the_command_shows_documents_and_compares_with_the_ledger(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_ranks(2, train_words, folder, words_of(cache))
    assert run_ranks(1, command, ["replay", f"run={folder}", "step=3"]) == [0]
    shown = capfd.readouterr().out
    assert f"step 3 of {folder}, from the beginning, 2 steps trained again first" in shown
    assert "reproduced" in shown
    assert run_ranks(1, command, ["replay", f"run={folder}", "step=3", "json=true"]) == [0]
    found = json.loads(capfd.readouterr().out)
    assert found["reproduced"]
    assert len(found["documents"]) >= 4
    assert main(["replay", f"run={folder}", "step=5"]) == 64
    assert "step=5 is not in the ledger of" in capfd.readouterr().err
    # Another loss in the ledger: the check fails, and says by how much.
    ledgers = [folder / f"ledger/rank0000{rank}.jsonl" for rank in (0, 1)]
    for ledger in ledgers:
        lines = [json.loads(line) for line in ledger.read_text().splitlines()]
        for line in lines:
            line["loss_sum"] = (float.fromhex(line["loss_sum"]) * 1.01).hex()
        ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_ranks(1, command, ["replay", f"run={folder}", "step=3"]) == [1]
    assert "NOT reproduced: recorded " in capfd.readouterr().out
