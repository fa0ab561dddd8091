"""The same losses, gradients and weights on every layout: the promise that all else stands on."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.mesh import MeshSpec
from trainer.record import read_lines

DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
HSDP = MeshSpec(dp_replicate=2, dp_shard=2)


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"]


@pytest.mark.parametrize(
    ("world_size", "mesh"), [(2, DDP), (2, FSDP), (4, DDP), (4, FSDP), (4, HSDP)]
)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6)])
def test_losses_and_norms_equal_those_of_one_process(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec, precision: str, tolerance: float
) -> None:
    changes = {"precision": precision, "max_steps": 5}
    run_ranks(1, train, tmp_path / "one", tiny_run(cache, **changes))
    run_ranks(world_size, train, tmp_path / "many", tiny_run(cache, mesh=mesh, **changes))
    for key in ("loss", "grad_norm"):
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "many", key)
        assert len(expected) == 5
        assert found == pytest.approx(expected, rel=tolerance, abs=0)
