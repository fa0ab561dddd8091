"""Products in float8: rounded as stated, nowhere else, and near bf16 in what they train."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.conftest import tiny_spec
from tests.distributed.test_layouts import FSDP, curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer import float8
from trainer.adapters.lora import LoRA
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.float8 import RECIPES, Float8, linears
from trainer.mesh import MeshSpec
from trainer.planning.memory import memory_of
from trainer.run import Run

EMULATED = Float8(emulate=True)
LINEARS = 14  # of two layers
LARGEST = 448.0  # of float8_e4m3fn


@pytest.fixture(autouse=True)
def _torchao() -> None:
    pytest.importorskip("torchao")


def float8_run(cache: Path, settings: Float8 = EMULATED, **changes: Any) -> Run:
    """A Llama whose sizes all divide by 16."""
    model = tiny_spec(hidden_size=64, intermediate_size=96)
    given = {"model": model, "precision": "fp8", "max_steps": 6, "mesh": MeshSpec()}
    engine = NativeEngine(float8=settings)
    return tiny_run(cache, **({"engine": engine} | given | changes))


def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Round to float8 under a power of two for each vector along `dim`."""
    largest = x.abs().amax(dim, keepdim=True).double().clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2(LARGEST / largest))).float()
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale


def test_a_product_rounds_its_rows_to_eight_bits_and_nothing_else(cache: Path) -> None:
    torch.manual_seed(0)
    run = float8_run(cache)
    model = run.plan_model().to_empty(device="cpu").bfloat16()
    name = "model.layers.0.mlp.up_proj"
    nn.init.normal_(model.get_submodule(name).weight, std=0.1)
    EMULATED.convert(model, run.model.layout)
    linear = model.get_submodule(name)
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(32, 96, dtype=torch.bfloat16)
    y = linear(x)
    y.backward(slope)
    weight = linear.weight.detach()
    assert x.grad is not None
    for found, expected in (
        (y.detach(), rounded(x.detach(), 1) @ rounded(weight, 1).T),
        (x.grad, rounded(slope, 1) @ rounded(weight, 0)),
        (linear.weight.grad, rounded(slope, 0).T @ rounded(x.detach(), 0)),
    ):
        assert found.dtype == torch.bfloat16
        difference = (found.float() - expected).abs().max()
        assert difference <= 2**-8 * expected.abs().max()  # the result is rounded to bf16


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_run_in_float8_goes_the_way_of_bf16(tmp_path: Path, cache: Path, recipe: str) -> None:
    """Within 2 %: e4m3 keeps 3 bits behind the point, so a value is off by up to 6 %."""
    run = float8_run(cache, Float8(recipe=recipe, emulate=True))
    run_ranks(1, train, tmp_path / "fp8", run)
    run_ranks(1, train, tmp_path / "bf16", replace(run, precision="bf16", engine=NativeEngine()))
    expected, found = curve(tmp_path / "bf16"), curve(tmp_path / "fp8")
    assert found == pytest.approx(expected, rel=2e-2, abs=0)
    assert found != expected
    assert found[-1] < 0.9 * found[0]


def test_shards_and_recomputed_blocks_train_as_one_process(tmp_path: Path, cache: Path) -> None:
    run = float8_run(cache)
    run_ranks(1, train, tmp_path / "one", run)
    recomputed = replace(
        run.engine, activation_checkpointing=replace(
            run.engine.activation_checkpointing, mode="selective"  # type: ignore[type-var]
        )
    )  # fmt: skip
    run_ranks(2, train, tmp_path / "two", replace(run, mesh=FSDP, engine=recomputed))
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):  # as bf16 has them
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "two", key)
        assert found == pytest.approx(expected, rel=tolerance, abs=0)


def test_checkpoints_hold_plain_weights_in_fp32(tmp_path: Path, cache: Path) -> None:
    run = float8_run(cache)
    run_ranks(1, train, tmp_path, run)
    names, dtypes = set(), set()
    for file in (tmp_path / "checkpoints" / "step_00000006" / "model").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
            dtypes |= {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    assert dtypes == {torch.float32}
    plain = dict(replace(run, engine=NativeEngine(), precision="bf16").plan_model().state_dict())
    assert names == set(plain) - {"lm_head.weight"}  # tied


def test_only_layers_that_train_and_divide_are_converted(cache: Path) -> None:
    run = float8_run(cache)
    model = run.plan_model()
    assert len(linears(model, run.model.layout)) == LINEARS
    for parameter in model.get_submodule("model.layers.0").parameters():
        parameter.requires_grad_(False)
    assert len(linears(model, run.model.layout)) == LINEARS // 2
    names = set(dict(model.named_parameters()))
    EMULATED.convert(model, run.model.layout)
    assert set(dict(model.named_parameters())) == names
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["lm_head"] == "LMHead"
    assert kinds["model.layers.0.mlp.up_proj"] == "Linear"
    assert kinds["model.layers.1.mlp.up_proj"] == "Float8Linear"


def test_a_plan_holds_what_bf16_holds(cache: Path) -> None:
    run = float8_run(cache, Float8())  # a machine without such a GPU plans it
    plain = replace(run, precision="bf16", engine=NativeEngine())
    assert memory_of(run, 1, is_gpu=True) == memory_of(plain, 1, is_gpu=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshSpec(tp=2)}, "precision=fp8 with mesh.tp=2: sums .* set mesh.tp=1"),
        ({"data_row_tokens": 40}, "found 40; set data.row_tokens to 48"),
        ({"model": tiny_spec(intermediate_size=24, hidden_size=24)}, "found no linear in a layer"),
        ({"adapter": LoRA(rank=4)}, "found no linear in a layer that trains"),
        ({"precision": "bf16"}, "float8.emulate=True has no effect; set precision=fp8"),
        ({"engine": AccelerateEngine()}, "precision=fp8 needs engine=native"),
        ({"engine": DeepSpeedEngine(stage=2)}, "trains in precision=fp32 or bf16"),
    ],
)
def test_what_float8_cannot_do_is_refused(
    cache: Path, changes: dict[str, Any], message: str
) -> None:
    run = float8_run(cache, **changes)
    with pytest.raises(ValueError, match=message):
        run.check(2 if run.mesh.lengths["tp"] > 1 else 1)


@pytest.mark.parametrize(
    ("settings", "found", "message"),
    [
        (Float8(), None, r"needs .* capability 9.0 or more, found no such GPU; set precision=bf16"),
        (Float8(), (8, 9), r"recipe=rowwise needs .* 9.0 or more, found one of 8.9"),
        (Float8(recipe="tensorwise"), (8, 0), r"tensorwise needs .* 8.9 or more, found one of 8.0"),
        (Float8(recipe="tensorwise"), (8, 9), r"engine.compile=false is slower than bf16"),
    ],
)
def test_machines_without_the_kernels_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, settings: Float8, found: Any, message: str
) -> None:
    monkeypatch.setattr(float8, "_capability", lambda: found)
    with pytest.raises(ValueError, match=message):
        float8_run(cache, settings).check(1)


def test_without_its_package_float8_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"needs the package torchao.*tessera-train\[quant\]"):
        float8_run(cache).check(1)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe='fine' is unknown; set it to one of rowwise, te"):
        Float8(recipe="fine")
