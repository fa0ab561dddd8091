"""No step asks a tensor for its value: on a GPU the host would wait for all work before it.

Tensors are fake: they have shapes and no values, so whatever asks for one raises, here as on a GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.conftest import tiny_spec
from tests.runs import tiny_run
from trainer.batch import Batch
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.numerics.spike import SpikeSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.planning.live import Ledger
from trainer.planning.pretend import Pretend
from trainer.preview import lay_out

MESHES = {
    "one process": (1, MeshSpec()),
    "fsdp": (64, MeshSpec(dp_shard=-1)),
    "hsdp": (64, MeshSpec(dp_replicate=2, dp_shard=-1)),
    "fsdp x tp": (64, MeshSpec(dp_shard=-1, tp=2)),
}


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def engine_of(cache: Path, mesh: str, **changes: Any) -> tuple[Any, Pretend]:
    """Return the engine of rank 0 over weights without values, and the mode that made them."""
    world_size, spec = MESHES[mesh]
    run = tiny_run(
        cache, model=tiny_spec(attn_implementation="sdpa"), mesh=spec, precision="bf16",
        data_global_rows=2 * world_size, **changes,
    )  # fmt: skip
    laid_out, built = lay_out(run, world_size, 0)
    ledger, device = Ledger(), torch.device("cpu")
    mode = Pretend(ledger)
    with ledger.watching_sizes(), mode:
        laid_out.fill(device, lambda _, start, stop: torch.empty(stop - start))
        return run.engine.build(laid_out, run.surroundings(laid_out.parts[0], built, device)), mode


def batch() -> Batch:
    ids = torch.zeros(2, 32, dtype=torch.int64)
    return Batch(
        input_ids=ids, labels=ids, position_ids=ids, segment_ids=ids + 1, provenance=("", "")
    )  # fmt: skip


def two_steps(engine: Any, mode: Pretend) -> Any:
    with mode.shapes:
        batches = [batch(), batch()]
        engine.train_step(1, batches, 128)
        return engine.train_step(2, batches, 128)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_asks_for_no_value(cache: Path, mesh: str) -> None:
    result = two_steps(*engine_of(cache, mesh))
    with pytest.raises(DataDependentOutputException):  # what would have been raised
        result.loss_sum.item()


@pytest.mark.parametrize("policy", ["clip", "skip"])
def test_a_guard_that_looks_for_spikes_asks_for_no_value(cache: Path, policy: str) -> None:
    spike = SpikeSpec(policy=policy, z=2.5, alpha=0.97, warmup_steps=25)
    two_steps(*engine_of(cache, "fsdp", spike=spike))


def test_recomputed_blocks_ask_for_no_value(cache: Path) -> None:
    recompute = NativeEngine(activation_checkpointing=ActivationCheckpointing(mode="full"))
    two_steps(*engine_of(cache, "fsdp", engine=recompute))
