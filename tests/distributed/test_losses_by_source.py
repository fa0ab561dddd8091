"""The loss of each source of a training step, on every layout: against documents one by one."""

from dataclasses import replace
from functools import cache as memo
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import heads
from models.nn.head import IGNORED
from tests.distributed.cases import Case
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.parallel.materialise import materialise, random_values
from trainer.verify.rows import NUM_SOURCES

import_deepspeed("cpu")  # once, not in every rank


def case_of(layout: str, head: str) -> Case:
    return Case(layout=layout, family="Llama", head=head, tied=False, option="accumulation")


def one_step(placement: Placement, case: Case, cache: Path) -> np.ndarray:
    """Return (2, sources) losses and targets of the first step. Collective."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    run, rows = case.run(cache), case.rows()
    mesh = run.mesh.build(ranks=ranks)
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    batches = rows.micro_batches(1, mesh.dp_rank, mesh.dp_size)
    result = engine.train_step(1, batches, rows.num_tokens(batches))
    ranks.barrier()
    ranks.close()
    return result.by_source.numpy()


@memo
def one_by_one(head: str, cache: Path) -> np.ndarray:
    """Return the same of a plain loop: every document in a row of its own, in fp64."""
    case = case_of("single", head)
    run = case.run(cache)
    model: Any = run.trained_model()
    materialise(model, torch.device("cpu"), random_values(model, run.model.initializer_range, 0))
    found = np.zeros((2, NUM_SOURCES))
    for batch in case.rows().micro_batches(1, 0, 1):
        number = int(batch.provenance[0].removeprefix("made[").partition(":")[0])
        for segment in batch.segment_ids[0].unique().tolist():
            if segment == 0:
                continue
            own = batch.segment_ids[0] == segment
            ids = batch.input_ids[:1, own]
            targets = batch.labels[0, own]
            with torch.no_grad():
                logits = model(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids))[0]
            if head == heads.SEQUENCE:
                assert batch.class_labels is not None
                targets = batch.class_labels[0, segment - 1 : segment]
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            found[:, (number + segment) % 2] += float(loss), int((targets != IGNORED).sum())
    return found


@pytest.mark.parametrize(
    ("layout", "head"),
    [
        *((layout, heads.CAUSAL_LM) for layout in ("single", "ddp", "fsdp", "tp+sp", "cp", "pp")),
        *((layout, heads.CAUSAL_LM) for layout in ("accelerate", "zero 2", "zero 3 x cp")),
        *((layout, heads.SEQUENCE) for layout in ("single", "ddp", "cp", "pp")),
        *((layout, heads.TOKEN) for layout in ("single", "cp")),
    ],
)
def test_losses_by_source_are_those_of_documents_one_by_one(
    cache: Path, layout: str, head: str
) -> None:
    case, expected = case_of(layout, head), one_by_one(head, cache)
    assert (expected[1] > 0).tolist() == [True, True, False]
    for found in run_ranks(prod(case.mesh.lengths.values()), one_step, case, cache):
        assert found[1].tolist() == expected[1].tolist()
        assert found[0] == pytest.approx(expected[0], rel=case.standard.tolerance, abs=0)


def test_a_loss_that_is_not_finite_stays_with_its_source(cache: Path) -> None:
    (batch, *_) = case_of("single", heads.CAUSAL_LM).rows().micro_batches(1, 0, 1)
    assert batch.sources is not None
    values = torch.ones(batch.labels.shape)
    values[batch.sources == 1] = torch.nan
    first, second, third = batch.by_source(values).tolist()
    assert (first, third) == (int((batch.sources == 0).sum()), 0)
    assert second != second
    assert replace(batch, sources=None, num_sources=0).by_source(values).tolist() == []
