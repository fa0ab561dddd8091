"""What only a GPU can show of its levers: products in float8, steps that never wait."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import tiny_spec
from trainer.float8 import RECIPES, Float8

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no CUDA GPU"
)
ROOT = Path(__file__).resolve().parents[2]


def product(settings: Float8) -> list[torch.Tensor]:
    """Return the result of one converted linear on the GPU, and both gradients."""
    spec = tiny_spec(hidden_size=64, intermediate_size=96)
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=32)
    model = model.to_empty(device="cuda").bfloat16()
    settings.convert(model, spec.layout)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    torch.manual_seed(0)
    nn.init.normal_(linear.weight, std=0.1)  # type: ignore[arg-type]
    x = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = linear(x)
    y.backward(torch.randn_like(y))
    assert isinstance(x.grad, torch.Tensor)
    assert isinstance(linear.weight.grad, torch.Tensor)
    return [y.detach(), x.grad, linear.weight.grad]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_products_in_float8_are_those_of_the_emulation(recipe: str) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip(f"recipe={recipe} needs compute capability {RECIPES[recipe]}")
    found, expected = product(Float8(recipe=recipe)), product(Float8(recipe=recipe, emulate=True))
    for ours, theirs in zip(found, expected, strict=True):
        # The same rounded values; sums in another order, and results rounded to bf16.
        assert (ours - theirs).abs().max() <= 2**-7 * theirs.abs().max()


def test_a_step_waits_for_nothing_and_compiles_once() -> None:
    words = ["size=tiny", "only=1b 4096,8b lora 4096"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.train", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in (
        "allocator retries", "recompiles after warm-up", "cases with a host sync in a step",
    ):  # fmt: skip
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {name} ")]
        assert line.endswith("| yes |"), done.stdout
