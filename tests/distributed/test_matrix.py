"""Layouts against one process, in fp64: loss, every gradient, norm, an SGD and an AdamW update.

Every commit runs all pairs of (layout, family, head, tying, option). All triples:

    pytest tests/distributed/test_matrix.py --triples
"""

from functools import cache as memo
from pathlib import Path

import pytest

from tests.distributed.cases import Case, covering
from tests.ranks import run_ranks
from trainer.verify.compare import NATIVE_TOLERANCE, first_step
from trainer.verify.measure import Answer, Question, answer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    strength = 3 if metafunc.config.getoption("--triples") else 2
    if "case" in metafunc.fixturenames:
        cases = sorted(covering(strength))
        metafunc.parametrize("case", cases, ids=str)


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
    for check in first_step(found, expected, NATIVE_TOLERANCE):
        assert check.passes, check
