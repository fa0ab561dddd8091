"""The accelerate engine: what it would silently run as copies is refused. Numbers: test_matrix."""

from pathlib import Path

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


@pytest.mark.parametrize(
    ("mesh", "ddp", "message"),
    [
        (MeshSpec(dp_shard=2), {}, r"mesh.dp_shard=2: accelerate would run copies"),
        (MeshSpec(tp=2), {}, r"mesh.tp=2: accelerate would run copies"),
        (MeshSpec(dp_replicate=2), {"bucket_cap": 1}, r"engine.ddp.bucket_cap is no setting"),
    ],
)
def test_what_accelerate_would_ignore_is_refused(
    cache: Path, mesh: MeshSpec, ddp: dict[str, int], message: str
) -> None:
    run = tiny_run(cache, mesh=mesh, engine=AccelerateEngine(ddp=ddp))
    with pytest.raises(ValueError, match=message):
        run.check(2)


def test_a_variable_that_accelerate_would_follow_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP is set"):
        tiny_run(cache, engine=AccelerateEngine()).check(2)
