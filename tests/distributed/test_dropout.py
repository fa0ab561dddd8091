"""Dropout over tensor-parallel ranks: heads differ, the stream does not, and copies stay equal."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.parity.oracle import specs
from tests.distributed.cases import spec_of
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.own_numbers import OwnNumbers
from trainer.run import Run
from trainer.verify.rows import MadeRows
from trainer.verify.whole import whole


def losses(
    placement: Placement, runs: list[Run], steps: int
) -> list[tuple[list[float], list[str]]]:
    """Train each run on made rows; return its losses, and where copies of weights differ between
    ranks."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = runs[0].mesh.build(ranks=ranks)
    outcomes = []
    for run in runs:
        engine = build_engine(run, run.plan_model(), ranks, mesh)
        rows, found = MadeRows(vocab_size=run.model.vocab_size), []
        for step in range(1, steps + 1):
            batches = rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
            result = engine.train_step(step, batches, rows.num_tokens(batches))
            found.append(float(result.loss_sum / result.num_targets))
        complaints: list[str] = []
        whole(engine.weights(), ranks, complaints)
        outcomes.append((found, complaints))
    return outcomes


DROPOUT = {
    "Llama": {"attention_dropout": 0.5},
    "GPT-BigCode (MQA)": {"attn_pdrop": 0.5, "resid_pdrop": 0.3, "embd_pdrop": 0.2},
    "Idefics": {"dropout": 0.3},
}


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("family", list(DROPOUT))
def test_copies_stay_equal_and_recomputing_gives_the_same_bits(
    cache: Path, family: str, sequence: bool
) -> None:
    spec = replace(spec_of(family, tied=False), **DROPOUT[family])
    runs = [
        tiny_run(
            cache, model=spec, mesh=MeshSpec(tp=2), precision="fp64",
            engine=NativeEngine(
                sequence_parallel=sequence,
                activation_checkpointing=ActivationCheckpointing(mode=mode),
            ),
        )
        for mode in ("none", "full")
    ]  # fmt: skip
    off = replace(runs[0], model=spec_of(family, tied=False))
    (kept, complaints), (recomputed, _), (without, _) = run_ranks(2, losses, [*runs, off], 3)[0]
    assert complaints == []
    assert recomputed == kept
    assert without != kept


def test_own_numbers_differ_by_rank_and_leave_the_common_ones_alone() -> None:
    drawn, after = [], []
    for rank in (0, 1):
        numbers = OwnNumbers(rank)
        torch.manual_seed(0)
        numbers.begin()
        drawn.append(torch.rand(4))
        numbers.end()
        after.append(torch.rand(4))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(after[0], after[1])
    assert set(DROPOUT) <= set(specs())


def test_own_numbers_keep_the_state_of_the_gpu_that_is_used_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []

    def fork_rng(devices: list[int] | None = None) -> AbstractContextManager[None]:
        kept.append(devices)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    OwnNumbers(0).begin()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    OwnNumbers(0).begin()
    assert kept == [[], [3]]
