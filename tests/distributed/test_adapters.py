"""Adapters on every layout against one process, to the matrix's limits: 1e-12, ZeRO 1e-5."""

from functools import cache as memo
from pathlib import Path

import pytest

from models import heads
from tests.distributed.cases import LAYOUTS, Case
from tests.distributed.test_matrix import ask
from trainer.verify.compare import first_step
from trainer.verify.measure import Answer

LM, SEQUENCE, TOKEN = heads.CAUSAL_LM, heads.SEQUENCE, heads.TOKEN
MQA, MHA = "GPT-BigCode (MQA)", "GPT-BigCode (MHA)"
CASES = [
    Case("ddp", "Llama", SEQUENCE, False, "accumulation", "dora"),
    Case("fsdp", "Llama", LM, True, "checkpointing", "lora"),
    Case("fsdp", "Idefics", LM, False, "plain", "dora"),
    Case("hsdp", MHA, TOKEN, True, "plain", "ia3"),
    Case("tp", "Llama", LM, True, "plain", "lora"),
    Case("tp", MQA, LM, True, "plain", "dora"),
    Case("tp", "Gemma", SEQUENCE, False, "plain", "ia3"),
    Case("tp+sp", "Gemma", LM, True, "checkpointing", "dora"),
    Case("tp+sp", MQA, TOKEN, False, "plain", "ia3"),
    Case("tp+sp", "Idefics", LM, False, "plain", "lora"),
    Case("cp", "Llama", LM, False, "plain", "rslora"),
    Case("pp", "Llama", LM, True, "checkpointing", "lora"),
    Case("pp", MHA, SEQUENCE, False, "plain", "dora"),
    Case("fsdp x tp", MQA, LM, False, "checkpointing", "lora"),
    Case("fsdp x tp", "Llama", TOKEN, True, "plain", "dora"),
    Case("accelerate", "Gemma", LM, True, "plain", "lora"),
    Case("zero 1", "Llama", LM, True, "accumulation", "lora"),
    Case("zero 2", MHA, TOKEN, False, "checkpointing", "ia3"),
    Case("zero 3", "Llama", SEQUENCE, False, "checkpointing", "lora"),
    Case("zero 3", "Gemma", LM, True, "plain", "dora"),
    Case("zero 2 x tp", MQA, LM, False, "plain", "dora"),
    Case("zero 3 x cp", "Llama", LM, True, "plain", "ia3"),
]


def test_every_layout_and_every_kind_of_adapter_is_among_the_cases() -> None:
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert {case.adapter for case in CASES} == {"lora", "rslora", "dora", "ia3"}


@memo
def reference(case: Case, cache: Path) -> Answer:
    return ask(case, cache)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapters_train_as_on_one_process(case: Case, cache: Path) -> None:
    expected, found = reference(case.reference, cache), ask(case, cache)
    assert not found.complaints
    names = expected.kinds["gradients"].keys()
    assert all("lora_" in n or "ia3_" in n or n.startswith(("score", "classifier")) for n in names)
    # Each has a gradient: zeros would agree on every layout.
    assert all(gradient.any() for gradient in expected.kinds["gradients"].values())
    for check in first_step(found, expected, case.standard):
        assert check.passes, check
