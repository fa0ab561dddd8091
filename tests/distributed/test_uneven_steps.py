"""Pipelines over steps whose number of micro-batches varies, as packed documents make them."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import heads
from tests.distributed.cases import spec_of
from tests.distributed.test_layouts import curve, eval_losses
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train
from tests.tasks import HeadTask
from tests.trainer.test_documents import ROWS, written
from trainer.batch import Batch
from trainer.construct import build_engine
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.tokenizers import ByteTokenizer
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.run import Run
from trainer.verify.compare import FP64
from trainer.verify.rows import MadeRows
from trainer.verify.whole import Tensors, deviation, whole

ROWS_OF = (1, 5, 2, 7, 1, 4)  # each step; a micro-batch has one


@dataclass(frozen=True, kw_only=True)
class UnevenRows(MadeRows):
    """Made rows, another number in each step; every data rank has equally many micro-batches."""

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[Batch]:
        made = super().micro_batches(step, 0, 1)[: ROWS_OF[step - 1]]
        return (made + [made[0].blank()] * (-len(made) % num_ranks))[rank::num_ranks]


def computed(placement: Placement, run: Run, rows: UnevenRows) -> tuple[list[Tensors], list[str]]:
    """Return loss, norm and every gradient of each step, and where copies differ."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    engine = build_engine(run, run.plan_model(), ranks, mesh)
    found, complaints = [], []
    for step in range(1, len(ROWS_OF) + 1):
        batches = rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        result = engine.train_step(step, batches, rows.num_tokens(batches))
        # Without momentum, Adam's first moment is the gradient.
        state = {n: p for n, p in engine.optimizer_state().items() if n.startswith("exp_avg/")}
        numbers = {
            "loss": np.array(float(result.loss_sum / result.num_targets.clamp(min=1))),
            "norm": np.array(float(result.grad_norm)),
        }
        found.append(numbers | (whole(state, ranks, complaints) or {}))
    ranks.barrier()
    ranks.close()
    return (found if placement.is_main else []), complaints


@pytest.fixture(scope="module")
def expected(cache: Path) -> dict[str, list[Tensors]]:
    """What one process computes, for each head."""
    return {
        head: run_ranks(1, computed, *asked(cache, head))[0][0]
        for head in (heads.CAUSAL_LM, heads.SEQUENCE)
    }


def asked(cache: Path, head: str, **changes: Any) -> tuple[Run, UnevenRows]:
    spec = replace(spec_of("Llama", tied=True), num_hidden_layers=4)
    run = tiny_run(
        cache, model=spec, task=HeadTask(head=head), precision="fp64",
        optim=AdamW(lr=1e-3, betas=(0.0, 0.95), eps=1e-3, max_grad_norm=None), **changes,
    )  # fmt: skip
    relabel = HeadTask(head=head).relabel
    return run, UnevenRows(vocab_size=spec.vocab_size, micro_rows=1, relabel=relabel)


@pytest.mark.parametrize(
    ("axes", "chunks", "head"),
    [
        ({"pp": 2}, 1, heads.CAUSAL_LM),
        ({"pp": 2}, 2, heads.CAUSAL_LM),
        ({"pp": 2}, 1, heads.SEQUENCE),
        ({"pp": 3}, 1, heads.CAUSAL_LM),
        ({"pp": 2, "dp_replicate": 2}, 1, heads.CAUSAL_LM),
        ({"pp": 2, "dp_shard": 2}, 2, heads.CAUSAL_LM),
        ({"pp": 2, "cp": 2}, 1, heads.CAUSAL_LM),
        ({"pp": 2, "tp": 2}, 1, heads.CAUSAL_LM),
    ],
)
def test_a_pipeline_computes_what_one_process_does_in_steps_of_any_number_of_micro_batches(
    cache: Path, expected: dict[str, list[Tensors]], axes: dict[str, int], chunks: int, head: str
) -> None:
    engine = NativeEngine(pipeline_chunks=chunks)
    run, rows = asked(cache, head, mesh=MeshSpec(**axes), engine=engine)
    found, complaints = run_ranks(prod(axes.values()), computed, run, rows)[0]
    assert not complaints
    for step, (ours, one) in enumerate(zip(found, expected[head], strict=True), 1):
        assert ours.keys() == one.keys()
        worst = deviation(f"step {step}", ours, one, FP64.floor_share)
        assert worst.value <= FP64.tolerance, worst


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DocumentData:
    """Documents that make 4 to 6 rows of a step; they are tokenised once, not by the ranks."""
    folder = tmp_path_factory.mktemp("documents")
    data = DocumentData(
        path=written(folder / "rows.jsonl", ROWS), encoder=ChatEncoder(), eval_fraction=0.1,
        row_tokens=64, global_documents=9, cache=str(folder / "cache"),
    )  # fmt: skip
    loader, _ = data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    assert len({len(loader.step(step).micro_batches) for step in range(6)}) > 1
    return data


@pytest.mark.parametrize(("ranks", "axes"), [(2, {"pp": 2}), (4, {"pp": 2, "dp_shard": 2})])
def test_a_pipeline_trains_on_packed_documents_and_gives_the_run_to_one_process(
    tmp_path: Path, cache: Path, documents: DocumentData, ranks: int, axes: dict[str, int]
) -> None:
    one = replace(
        tiny_run(cache, precision="fp64", max_steps=6, eval_every=3, save_every=3), data=documents
    )
    many = replace(one, mesh=MeshSpec(**axes))
    many.check(ranks)
    run_ranks(1, train, tmp_path / "one", one)
    run_ranks(ranks, train, tmp_path / "many", replace(many, max_steps=3))
    run_ranks(1, train, tmp_path / "many", one)
    for key in ("loss", "grad_norm", "num_targets"):
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "many", key)
        assert len(expected) == 6
        assert found == pytest.approx(expected, rel=1e-12, abs=0)
    assert eval_losses(tmp_path / "many") == pytest.approx(
        eval_losses(tmp_path / "one"), rel=1e-12, abs=0
    )
