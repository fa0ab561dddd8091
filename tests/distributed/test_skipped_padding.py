"""Where padding is left out, and layouts that do so against one process that computes it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import heads
from models.nn import unpadded
from tests.conftest import tiny_spec
from tests.distributed.cases import LAYOUTS, Case
from tests.distributed.test_layouts import curve, eval_losses
from tests.distributed.test_matrix import ask
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train
from tests.trainer.test_documents import ROWS, written
from trainer.construct import build_engine
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.distributed import Placement, Ranks
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.run import Run
from trainer.run_data import data_of
from trainer.verify.compare import first_step

import_deepspeed("cpu")  # once, not in every rank


def count_by(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trunks compute a multiple of `by` tokens."""
    monkeypatch.setattr(unpadded, "counted", lambda number, _: -(-number // by) * by)


def is_skipped(placement: Placement, run: Run) -> bool:
    """Build an engine; return whether its model leaves padding out."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    model: Any = run.plan_model()
    build_engine(run, model, ranks, run.mesh.build(ranks=ranks)).close()
    ranks.close()
    return bool(model.skips_padding)


def test_one_process_skips_padding_unless_shapes_or_bits_have_to_stay(cache: Path) -> None:
    run = tiny_run(cache)
    kept = {
        "compile": replace(run, engine=NativeEngine(compile=True)),
        "topology_free": replace(run, deterministic="topology_free"),
        "eager": replace(run, model=tiny_spec(attn_implementation="eager")),
        "dropout": replace(run, model=tiny_spec(attention_dropout=0.1)),
    }
    skipping = {
        "plain": run,
        "run": replace(run, deterministic="run"),
        "accelerate": replace(run, engine=AccelerateEngine()),
    }
    found = {name: run_ranks(1, is_skipped, each)[0] for name, each in (kept | skipping).items()}
    assert [name for name, skips in found.items() if skips] == list(skipping)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp", "cp", "pp"])
def test_ranks_that_share_a_row_keep_its_shape(layout: str, cache: Path) -> None:
    run = tiny_run(cache, mesh=LAYOUTS[layout])
    assert run_ranks(2, is_skipped, run) == [layout in ("ddp", "fsdp")] * 2


def sizes_computed(placement: Placement, run: Run) -> list[tuple[int, int]]:
    """Train two steps; return how many tokens each micro-batch has, and for how many the trunk
    computed."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    model: Any = run.plan_model()
    engine = build_engine(run, model, ranks, mesh)
    computed: list[int] = []
    model.trunk.register_forward_pre_hook(lambda _, text: computed.append(text[0].numel()))
    _, loader, _ = data_of(run, rank=mesh.dp_rank, num_ranks=mesh.dp_size)
    steps = [loader.step(number) for number in range(2)]
    for number, step in enumerate(steps, start=1):
        engine.train_step(number, step.micro_batches, step.num_tokens)
    ranks.close()
    real = [int(b.segment_ids.count_nonzero()) for step in steps for b in step.micro_batches]
    return list(zip(real, computed, strict=True))


def test_in_bf16_shards_compute_tokens_by_the_hundred_and_twenty_eight(
    tmp_path: Path, cache: Path
) -> None:
    """Weights are fp32, and shards until they are used: so is an embedding that is no head."""
    rows, full = 7, 7 * 64
    data = DocumentData(
        path=written(tmp_path / "rows.jsonl", ROWS), encoder=ChatEncoder(), eval_fraction=0.1,
        row_tokens=64, global_documents=4 * rows, micro_rows=rows, packing="off", cache=str(cache),
    )  # fmt: skip
    run = tiny_run(
        cache, data=data, model=tiny_spec(tie_word_embeddings=False), mesh=LAYOUTS["fsdp"],
        precision="bf16",
    )  # fmt: skip
    found = [pair for of_rank in run_ranks(2, sizes_computed, run) for pair in of_rank]
    assert len(found) == 8
    assert all(real % 128 for real, _ in found)  # else nothing would be seen
    assert [size for _, size in found] == [min(-(-real // 128) * 128, full) for real, _ in found]
    assert min(size for _, size in found) < full


@pytest.mark.parametrize("option", ["plain", "checkpointing", "frozen"])
@pytest.mark.parametrize("family", ["Llama", "GPT-BigCode (MQA)", "Idefics"])
@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp", "accelerate", "zero 2", "zero 3"])
def test_layouts_without_padding_compute_what_one_process_computes_with_it(
    layout: str, family: str, option: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = heads.SEQUENCE if family == "Llama" else heads.CAUSAL_LM
    case = Case(layout, family, head, False, option)
    count_by(2 * 32, monkeypatch)  # never less than the rows of a batch
    expected = ask(case.reference, cache)
    count_by(8, monkeypatch)
    found = ask(case, cache)
    assert not found.complaints
    for check in first_step(found, expected, case.standard):
        assert check.passes, check


@pytest.mark.parametrize("packing", ["best_fit", "off"])
def test_fine_tuning_evaluates_and_resumes_as_with_padding(
    packing: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DocumentData(
        path=written(tmp_path / "rows.jsonl", ROWS), encoder=ChatEncoder(), eval_fraction=0.1,
        row_tokens=64, global_documents=12, micro_rows=4, packing=packing, cache=str(cache),
    )  # fmt: skip
    run = tiny_run(cache, data=data, precision="fp64", max_steps=6, eval_every=2)
    count_by(4 * 64, monkeypatch)  # never less than whole rows
    run_ranks(1, train, tmp_path / "padded", run)
    count_by(8, monkeypatch)
    run_ranks(1, train, tmp_path / "found", run)
    run_ranks(1, train, tmp_path / "resumed", replace(run, max_steps=4))
    run_ranks(1, train, tmp_path / "resumed", run)
    for read in (curve, eval_losses):
        expected, found = read(tmp_path / "padded"), read(tmp_path / "found")
        assert found == pytest.approx(expected, rel=1e-10, abs=0)
        assert read(tmp_path / "resumed") == found
