"""Layouts against one process, loss, every gradient, norm, an SGD and an AdamW update.

To 1e-12 in fp64; DeepSpeed to 1e-5 in fp32, against the same reference.

Every commit runs all pairs of (layout, family, head, tying, option), the slow command those of
three more layouts of DeepSpeed. All triples of all layouts:

    pytest tests/distributed/test_matrix.py --triples
"""

from functools import cache as memo
from pathlib import Path

import pytest

from tests.distributed.cases import LAYOUTS, RARE, Case, by_urgency, covering
from tests.ranks import run_ranks
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.verify.compare import first_step
from trainer.verify.measure import Answer, Question, answer

import_deepspeed("cpu")  # once, not in every rank


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--triples"):
        metafunc.parametrize("case", sorted(covering(3)), ids=str)
        return
    usual = [layout for layout in LAYOUTS if layout not in RARE]
    cases = sorted(covering(2, usual)) + sorted(covering(2, RARE))
    metafunc.parametrize("case", by_urgency(cases, *usual))


@memo
def reference(case: Case, cache: Path) -> Answer:
    return ask(case, cache)


def ask(case: Case, cache: Path) -> Answer:
    question = Question(run=case.run(cache), rows=case.rows(), steps=0)
    world_size = 1
    for length in case.mesh.lengths.values():
        world_size *= length
    first: Answer = run_ranks(world_size, answer, question)[0]
    return first


def test_the_layout_computes_what_one_process_computes(case: Case, cache: Path) -> None:
    expected, found = reference(case.reference, cache), ask(case, cache)
    assert not found.complaints
    for check in first_step(found, expected, case.standard):
        assert check.passes, check
