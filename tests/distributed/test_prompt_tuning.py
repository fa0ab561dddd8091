"""Virtual tokens on layouts against one process, to the matrix's limits: 1e-12, ZeRO 1e-5."""

from functools import cache as memo
from pathlib import Path

import pytest

from models import heads
from tests.distributed.cases import Case, by_urgency
from tests.distributed.test_matrix import ask
from trainer.verify.compare import first_step
from trainer.verify.measure import Answer

LM, SEQUENCE, TOKEN = heads.CAUSAL_LM, heads.SEQUENCE, heads.TOKEN
CASES = [
    Case("ddp", "Llama", SEQUENCE, False, "accumulation", "prompt"),
    Case("fsdp", "Llama", LM, True, "checkpointing", "prompt"),
    Case("fsdp x tp", "Llama", LM, False, "plain", "prompt"),
    Case("tp", "Gemma", LM, True, "plain", "prompt"),
    Case("tp+sp", "GPT-BigCode (MQA)", TOKEN, False, "plain", "prompt"),
    Case("cp", "Llama", LM, True, "plain", "prompt"),
    Case("pp", "Llama", LM, False, "plain", "prompt"),
    Case("pp", "GPT-BigCode (MQA)", LM, True, "checkpointing", "prompt"),
    Case("accelerate", "Llama", LM, True, "plain", "prompt"),
    Case("zero 2", "Llama", LM, True, "accumulation", "prompt"),
    Case("zero 3", "Gemma", LM, False, "plain", "prompt"),
    Case("zero 2 x tp", "Llama", LM, True, "plain", "prompt"),
]


@memo
def reference(case: Case, cache: Path) -> Answer:
    return ask(case, cache)


@pytest.mark.parametrize("case", by_urgency(CASES, "fsdp", "tp+sp", "pp", "zero 3"))
def test_virtual_tokens_train_as_on_one_process(case: Case, cache: Path) -> None:
    expected, found = reference(case.reference, cache), ask(case, cache)
    assert not found.complaints
    gradients = expected.kinds["gradients"]
    ends = (".additional_embedding.weight", "score.weight", "classifier.weight", "classifier.bias")
    assert any(name.endswith(ends[0]) for name in gradients)
    assert all(name.endswith((*ends, "score.bias")) for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())
    for check in first_step(found, expected, case.standard):
        assert check.passes, check
