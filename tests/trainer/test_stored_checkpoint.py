"""A checkpoint of the first format, kept as files: it has to load for ever."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.ranks import run_ranks
from tests.runs import tiny_run
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.tensor_hash import tensor_hash
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.mesh import MeshSpec
from trainer.run import Run

STORED = Path(__file__).parent / "stored/version_1"
STEP = 2  # of tiny_run on one rank
TENSORS = "5d1350048b5c33653fce4da49aa68719"


def restored_and_saved_again(placement: Placement, folder: Path, run: Run) -> int:
    """Load the stored step into an engine and save it as the next one; return its progress."""
    ranks = Ranks(placement, run.timeout_seconds)
    mesh = run.mesh.build(ranks=ranks)
    lock = RunLock(folder) if placement.is_main else None
    checkpoints = Checkpoints(
        run.checkpoint, folder / "checkpoints", ranks=ranks, lock=lock, facts={},
        describe_model=lambda _: None, contents=Contents(),
    )  # fmt: skip
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    state = checkpoints.restore(lambda _: engine, [STEP])
    assert state is not None
    checkpoints.save(STEP + 1, engine, {}, is_last=True)
    ranks.close()
    step: int = state["progress"]["step"]
    return step


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    shutil.copytree(STORED, tmp_path / "checkpoints")
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2])
def test_stored_checkpoint_loads_bit_for_bit_on_any_number_of_ranks(
    run_folder: Path, cache: Path, world_size: int
) -> None:
    run = tiny_run(cache, mesh=MeshSpec(dp_shard=-1))
    assert run_ranks(world_size, restored_and_saved_again, run_folder, run) == [STEP] * world_size
    assert committed_steps(run_folder / "checkpoints") == [3, 2]
    for number in (3, 2):
        assert tensor_hash(run_folder / f"checkpoints/step_{number:08d}") == TENSORS


def test_tensor_hash_sees_every_tensor(run_folder: Path) -> None:
    step = run_folder / "checkpoints/step_00000002"
    path = step / "model/model.safetensors"
    size = sum(tensor.nbytes for tensor in load_file(path).values())
    data = bytearray(path.read_bytes())
    data[-size] ^= 1  # of the first tensor
    path.write_bytes(data)
    assert tensor_hash(step) != TENSORS
