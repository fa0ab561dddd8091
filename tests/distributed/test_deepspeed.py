"""The deepspeed engine in a real run: curves, evaluation, resume on other engines, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.binding import bind
from tests.distributed.test_layouts import curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.callbacks.closing import Closing
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.freeze import FreezeSpec
from trainer.mesh import MeshSpec

import_deepspeed("cpu")  # once, not in every rank


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_goes_on_between_deepspeed_and_native_with_the_same_curve(
    tmp_path: Path, cache: Path, stage: int
) -> None:
    settings: dict[str, Any] = {
        "save_every": 4, "freeze": FreezeSpec(frozen=("model.layers.0.mlp.*",)),
        "callbacks": {"closing": Closing(prompt="def f", sample_tokens=3)},
    }  # fmt: skip
    native = tiny_run(cache, **settings)
    run_ranks(1, train, tmp_path / "one", replace(native, max_steps=12))
    zero = replace(native, engine=DeepSpeedEngine(stage=stage))
    folder = tmp_path / "many"
    run_ranks(2, train, folder, replace(zero, max_steps=4))
    run_ranks(1, train, folder, replace(native, max_steps=8))
    run_ranks(2, train, folder, replace(zero, max_steps=12))
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "one", key)
        assert len(expected) == 12
        assert curve(folder, key) == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_starts_from_and_saves_fp32_masters(tmp_path: Path, cache: Path, stage: int) -> None:
    native = tiny_run(cache, precision="bf16", max_steps=3, save_every=1)
    run_ranks(1, train, tmp_path / "one", native)
    zero = replace(native, engine=DeepSpeedEngine(stage=stage), max_steps=2)
    run_ranks(2, train, tmp_path / "many", zero)
    run_ranks(1, train, tmp_path / "many", native)
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "one", key)
        assert curve(tmp_path / "many", key) == pytest.approx(expected, rel=1e-2, abs=0)


PLAIN = {"_target_": "trainer.engines.deepspeed.DeepSpeedEngine"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, r"engine.stage=4 is unknown; set it to one of \(0, 1, 2, 3\)"),
        ({"stage": 0, "offload_optimizer": True}, r"set engine.stage to 1, 2 or 3"),
        ({"stage": 2, "offload_parameters": True}, r"needs engine.stage=3, found 2"),
        ({"config": {"zero_optimizaton": {}}}, r"zero_optimizaton .* did you mean zero_optimiza"),
        ({"config": {"gradient_clipping": 1.0}}, r"is decided by optim.max_grad_norm"),
        ({"config": {"zero_optimization": {"stage": 3}}}, r"is decided by engine.stage"),
    ],
)
def test_settings_that_deepspeed_would_ignore_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bind({**PLAIN, **settings}, "engine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshSpec(dp_shard=2)}, r"mesh.dp_shard=2 has no effect .* set mesh=ddp"),
        ({"mesh": MeshSpec(tp=2)}, r"mesh.tp=2 is not for engine=deepspeed"),
        ({"precision": "fp64"}, r"trains in precision=fp32 or bf16"),
    ],
)
def test_runs_that_deepspeed_cannot_do_are_refused(
    cache: Path, changes: dict[str, Any], message: str
) -> None:
    run = tiny_run(cache, engine=DeepSpeedEngine(), **changes)
    with pytest.raises(ValueError, match=message):
        run.check(2)


def test_the_same_run_is_accepted_by_both_engines(cache: Path) -> None:
    for engine in (DeepSpeedEngine(), NativeEngine()):
        tiny_run(cache, engine=engine).check(2)
