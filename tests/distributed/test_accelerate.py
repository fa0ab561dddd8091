"""The accelerate engine: what it would silently run as copies is refused. Numbers: test_matrix."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_layouts import curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.accelerate import AccelerateEngine
from trainer.mesh import MeshSpec


def test_a_run_with_casts_equals_the_native_one(tmp_path: Path, cache: Path) -> None:
    settings = {"precision": "bf16", "max_steps": 5}
    run_ranks(2, train, tmp_path / "native", tiny_run(cache, **settings))
    engine = AccelerateEngine(ddp={"gradient_as_bucket_view": True})
    run_ranks(2, train, tmp_path / "accelerate", tiny_run(cache, engine=engine, **settings))
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "native", key)
        assert curve(tmp_path / "accelerate", key) == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_ranks(1, train, folder, tiny_run(cache, engine=AccelerateEngine(), max_steps=3))
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MIXED_PRECISION", "bf16"),
        ("GRADIENT_ACCUMULATION_STEPS", "4"),
        ("DYNAMO_BACKEND", "NO_SUCH_ONE"),  # whoever reads it fails
        ("USE_CPU", "False"),
    ],
)
def test_what_the_launcher_of_accelerate_sets_changes_no_number(
    plain: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    run_ranks(1, train, tmp_path / "run", tiny_run(cache, engine=AccelerateEngine(), max_steps=3))
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "run", key) == curve(plain, key)


DDP = MeshSpec(dp_replicate=2)


@pytest.mark.parametrize(
    ("mesh", "ddp", "message"),
    [
        (MeshSpec(dp_shard=2), {}, r"mesh.dp_shard=2: accelerate would run copies"),
        (MeshSpec(tp=2), {}, r"mesh.tp=2: accelerate would run copies"),
        (DDP, {"bucket_cap": 1}, r"engine.ddp.bucket_cap is no setting .*; set one of dim, "),
        (DDP, {"comm_hook": "bf16"}, r"engine.ddp.comm_hook is no setting .* applies here"),
        (DDP, {"static_graph": "yes"}, r"static_graph='yes' is of type str; .* of type bool"),
        (DDP, {"bucket_cap_mb": True}, r"bucket_cap_mb=True is of type bool; .* of type int"),
    ],
)
def test_what_accelerate_would_ignore_is_refused(
    cache: Path, mesh: MeshSpec, ddp: dict[str, Any], message: str
) -> None:
    run = tiny_run(cache, mesh=mesh, engine=AccelerateEngine(ddp=ddp))
    with pytest.raises(ValueError, match=message):
        run.check(2)


def test_settings_of_ddp_need_several_processes(cache: Path) -> None:
    run = tiny_run(cache, engine=AccelerateEngine(ddp={"bucket_cap_mb": 50}))
    run.check(2)
    with pytest.raises(ValueError, match=r"ddp\.bucket_cap_mb=50 has no effect on one process"):
        run.check(1)


@pytest.mark.parametrize("name", ["USE_FSDP", "FP8_BACKEND", "TORCH_DEVICE"])
def test_a_variable_that_accelerate_would_follow_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_{name} is set"):
        tiny_run(cache, engine=AccelerateEngine()).check(2)
