"""mesh=auto: copies where they fit, shards where they do not, and one choice for all ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.auto_mesh import AutoMesh
from trainer.mesh import MeshSpec
from trainer.record import read_lines

BILLION = 10**9


@pytest.mark.parametrize(
    ("auto", "parameters", "world_size", "shards_itself", "expected"),
    [
        # 16 bytes a parameter: 1 B is 14.9 GiB.
        ({"memory_gib": 80.0}, BILLION, 8, False, MeshSpec(dp_replicate=8)),
        ({"memory_gib": 80.0}, 8 * BILLION, 8, False, MeshSpec(dp_shard=8)),
        ({"memory_gib": 80.0}, 8 * BILLION, 16, False, MeshSpec(dp_replicate=2, dp_shard=8)),
        ({"memory_gib": 80.0}, 70 * BILLION, 64, False, MeshSpec(dp_replicate=2, dp_shard=32)),
        ({"memory_gib": 80.0, "tp": 4}, 8 * BILLION, 8, False, MeshSpec(dp_replicate=2, tp=4)),
        ({"memory_gib": 80.0, "tp": 2}, 8 * BILLION, 8, False, MeshSpec(dp_shard=4, tp=2)),
        ({"memory_gib": 80.0}, 8 * BILLION, 8, True, MeshSpec(dp_replicate=8)),
        ({"memory_gib": 1.0}, BILLION, 1, False, MeshSpec()),
    ],
)
def test_the_choice_follows_memory(
    auto: dict[str, Any], parameters: int, world_size: int, shards_itself: bool, expected: MeshSpec
) -> None:
    spec, reason = AutoMesh(**auto).chosen(
        num_parameters=parameters, world_size=world_size, shards_itself=shards_itself
    )
    assert spec == expected
    assert "GiB per rank" in reason


@pytest.mark.parametrize(
    ("auto", "world_size", "message"),
    [
        ({"memory_gib": 1.0}, 4, r"even shared by 4 ranks that is more than 60% of it; start more"),
        ({"tp": 3}, 4, r"need a multiple of 3 processes, found 4"),
    ],
)
def test_what_fits_nowhere_is_refused(auto: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoMesh(**auto).chosen(num_parameters=BILLION, world_size=world_size, shards_itself=False)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mesh=auto chooses mesh\.dp_replicate"):
        AutoMesh(dp_shard=2)
    with pytest.raises(ValueError, match=r"mesh\.memory_gib=0\.0 is not positive"):
        AutoMesh(memory_gib=0.0)


def test_a_run_takes_the_mesh_that_was_chosen(tmp_path: Path, cache: Path) -> None:
    tight = AutoMesh(memory_gib=2e-4)  # in GiB: less than 7 k parameters need
    for name, mesh in (("auto", tight), ("given", MeshSpec(dp_shard=2))):
        run = tiny_run(cache, mesh=mesh, max_steps=3)
        run_ranks(2, train, tmp_path / name, run)
    assert tiny_run(cache, mesh=tight).chosen_mesh(2)[0] == MeshSpec(dp_shard=2)
    auto, given = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("auto", "given"))
    assert [line["loss"] for line in auto] == [line["loss"] for line in given]
