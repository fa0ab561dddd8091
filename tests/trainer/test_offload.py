"""The optimizer in host memory: the same bits as on the device, and its state saved and loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.test_layouts import curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec

OFFLOADED = NativeEngine(offload_optimizer=True)


@pytest.mark.parametrize("mesh", [MeshSpec(dp_shard=2), MeshSpec(tp=2), MeshSpec(pp=2)])
def test_a_run_goes_on_with_and_without_it_in_the_same_bits(
    tmp_path: Path, cache: Path, mesh: MeshSpec
) -> None:
    plain = tiny_run(cache, mesh=mesh, precision="bf16", save_every=3)
    run_ranks(2, train, tmp_path / "plain", plain)
    offloaded = replace(plain, engine=OFFLOADED)
    for run, stop in ((offloaded, 3), (plain, 6), (offloaded, 10)):
        run_ranks(2, train, tmp_path / "mixed", replace(run, max_steps=stop))
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "mixed", key) == curve(tmp_path / "plain", key)
    assert weights(tmp_path / "mixed") == weights(tmp_path / "plain")


def weights(folder: Path) -> list[bytes]:
    last = folder / "checkpoints" / "step_00000010"
    return [path.read_bytes() for path in sorted(last.rglob("*.safetensors"))]
