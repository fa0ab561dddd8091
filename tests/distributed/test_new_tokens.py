"""New-token rows on layouts against one process, to the matrix's limits: 1e-12, ZeRO 1e-5."""

from functools import cache as memo
from pathlib import Path

import pytest

from models import heads
from tests.distributed.cases import Case
from tests.distributed.test_matrix import ask
from trainer.verify.compare import first_step
from trainer.verify.measure import Answer

LM, SEQUENCE, NEW = heads.CAUSAL_LM, heads.SEQUENCE, "new tokens"
CASES = [
    Case("fsdp", "Llama", LM, True, NEW),
    Case("tp+sp", "Llama", LM, False, NEW),
    Case("tp+sp", "Gemma", LM, True, NEW),
    Case("pp", "GPT-BigCode (MQA)", LM, True, NEW),
    Case("zero 3", "Llama", LM, False, NEW),
    Case("fsdp", "Llama", SEQUENCE, False, NEW),
    Case("tp", "Idefics", LM, True, NEW),
    Case("tp+sp", "Llama", LM, True, NEW, "dora"),
]


@memo
def reference(case: Case, cache: Path) -> Answer:
    return ask(case, cache)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_rows_train_as_on_one_process(case: Case, cache: Path) -> None:
    expected, found = reference(case.reference, cache), ask(case, cache)
    assert not found.complaints
    gradients = expected.kinds["gradients"]
    assert any("additional_embedding" in name for name in gradients)
    known = (".additional_embedding.weight", ".additional_fc.weight", "score.weight")
    ends = known if case.adapter == "none" else (*known, "lora_A.weight", "lora_B.weight", "vector")
    assert all(name.endswith(ends) for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())
    for check in first_step(found, expected, case.standard):
        assert check.passes, check
