"""What a plan says of memory is within a tenth of what torch's profiler sees a real run hold."""

from pathlib import Path

import pytest

from benchmarks.plan_memory.__main__ import LIMIT
from benchmarks.plan_memory.cases import CASES
from benchmarks.plan_memory.measure import measured
from trainer.planning.memory import memory_of


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        "llama full", "llama ddp", "llama pp", "llama zero2", "gemma lora", "gpt_bigcode fsdp",
        "gpt_bigcode tp", "idefics", "idefics ddp", "idefics fsdp",
    ],
)  # fmt: skip
def test_a_plan_is_within_a_tenth_of_the_peak_of_tensor_bytes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = max(held.tensor_bytes for held in measured(case, tmp_path, 300.0))
    planned = memory_of(case.run(tmp_path), case.processes, is_gpu=False)
    state = ("weights", "gradients", "optimizer")
    assert sum(planned.by_category[kind] for kind in state) > 5e7
    assert planned.peak == pytest.approx(found, rel=LIMIT)
