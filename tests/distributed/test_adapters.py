"""Adapters on every layout against one process, to the matrix's limits: 1e-12, ZeRO 1e-5."""

from functools import cache as memo
from pathlib import Path
from typing import Any

import pytest
import torch

from models import heads
from tests.distributed.cases import LAYOUTS, Case, adapter_of, by_urgency
from tests.distributed.test_matrix import ask
from tests.ranks import run_ranks
from tests.runs import tiny_run
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.mesh import MeshSpec
from trainer.run import Run
from trainer.verify.compare import first_step
from trainer.verify.measure import Answer
from trainer.verify.rows import MadeRows

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
    Case("fsdp x tp", MQA, LM, False, "checkpointing", "lora"),
    Case("accelerate", "Gemma", LM, True, "plain", "lora"),
    Case("zero 1", "Llama", LM, True, "accumulation", "lora"),
    Case("zero 2", MHA, TOKEN, False, "checkpointing", "ia3"),
    Case("zero 3", "Llama", SEQUENCE, False, "checkpointing", "lora"),
    Case("zero 3", "Gemma", LM, True, "plain", "dora"),
    Case("zero 2 x tp", MQA, LM, False, "plain", "dora"),
    Case("zero 3 x cp", "Llama", LM, True, "plain", "ia3"),
    Case("ddp", MQA, SEQUENCE, False, "checkpointing", "qlora"),
    Case("cp", "Gemma", LM, True, "plain", "qlora"),
    Case("accelerate", "Idefics", LM, False, "accumulation", "qlora"),
]


def test_every_layout_and_every_kind_of_adapter_is_among_the_cases() -> None:
    assert {case.layout for case in CASES} == set(LAYOUTS)
    assert {case.adapter for case in CASES} == {"lora", "rslora", "dora", "ia3", "qlora"}


@memo
def reference(case: Case, cache: Path) -> Answer:
    return ask(case, cache)


@pytest.mark.parametrize(
    "case", by_urgency(CASES, "fsdp", "tp+sp", "cp", "pp", "accelerate", "zero 3")
)
def test_adapters_train_as_on_one_process(case: Case, cache: Path) -> None:
    if case.adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    expected, found = reference(case.reference, cache), ask(case, cache)
    assert not found.complaints
    names = expected.kinds["gradients"].keys()
    assert all("lora_" in n or "ia3_" in n or n.startswith(("score", "classifier")) for n in names)
    # Each has a gradient: zeros would agree on every layout.
    assert all(gradient.any() for gradient in expected.kinds["gradients"].values())
    for check in first_step(found, expected, case.standard):
        assert check.passes, check


def steps_of(placement: Placement, run: Run, is_wide: bool) -> list[Any]:
    """Return loss and this rank's trained weights after each of three steps."""
    ranks = Ranks(placement, 20.0)
    mesh = run.mesh.build(ranks=ranks)
    model = run.trained_model()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for parameter in frozen if is_wide else ():
        parameter.data = parameter.data.float()
    engine = build_engine(run, model, ranks, mesh)
    rows = MadeRows(vocab_size=run.model.vocab_size)
    found = []
    for step in (1, 2, 3):
        batches = rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        loss = engine.train_step(step, batches, rows.num_tokens(batches)).loss_sum
        own = [p.local.flatten().tolist() for n, p in engine.weights().items() if "lora" in n]
        found.append((float(loss), own))
    ranks.close()
    return found


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(dp_shard=2)], ids=str)
def test_a_frozen_base_in_the_compute_type_gives_the_same_bits(mesh: MeshSpec, cache: Path) -> None:
    """Half the memory of fp32: weights are cast for each pass anyway."""
    adapter = adapter_of("dora", "Llama")
    run = tiny_run(cache, adapter=adapter, precision="bf16", mesh=mesh)
    world_size = 1 if mesh == MeshSpec() else 2
    narrow = run_ranks(world_size, steps_of, run, False)
    assert narrow == run_ranks(world_size, steps_of, run, True)
    assert narrow[0][0] != narrow[0][1]
