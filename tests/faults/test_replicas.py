"""Silent corruption: a flipped bit on one rank is found, and the rank is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.exit_codes import CORRUPT, code_of
from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run
from trainer.construct import fit
from trainer.distributed import Placement
from trainer.engines.native_trainer import NativeTrainer
from trainer.errors import CorruptionError
from trainer.mesh import MeshSpec
from trainer.replicas import checksum
from trainer.run import Run

HSDP = MeshSpec(dp_replicate=2, dp_shard=2)


def train_with_a_flip(placement: Placement, folder: Path, run: Run, odd: int) -> tuple[int, str]:
    """Train one rank; on rank `odd` one bit of one weight flips behind step 3."""
    step = NativeTrainer.train_step

    def flipped(self: NativeTrainer, number: int, *rest: Any) -> Any:
        result = step(self, number, *rest)
        if number == 3 and placement.rank == odd:
            local = next(piece.local for piece in self.weights().values() if piece.local.numel())
            # Not the last bit: the next update may round that away, and the copies are one again.
            local.detach().reshape(-1)[:1].view(torch.int32).bitwise_xor_(1 << 10)
        return result

    NativeTrainer.train_step = flipped  # type: ignore[method-assign]
    try:
        fit(run, start_in(folder, placement))
    except CorruptionError as error:
        return code_of(error), str(error)
    return 0, ""


@pytest.mark.parametrize(
    ("ranks", "mesh", "odd", "who"),
    [
        (3, MeshSpec(dp_replicate=-1), 1, "rank 1 differs from the 2 others"),
        (4, HSDP, 2, "ranks 0, 2 differ, and no majority says which is right"),
        (3, MeshSpec(dp_replicate=-1), 7, ""),
    ],
    ids=["copies", "sharded copies", "no flip"],
)
def test_a_flipped_bit_of_a_weight_is_found_and_its_rank_named(
    tmp_path: Path, cache: Path, ranks: int, mesh: MeshSpec, odd: int, who: str
) -> None:
    run = tiny_run(
        cache, check_replicas_every=2, mesh=mesh, max_steps=6, data_global_rows=12,
        data_micro_rows=1,
    )  # fmt: skip
    for code, message in run_ranks(ranks, train_with_a_flip, tmp_path, run, odd):
        assert code == (CORRUPT if who else 0)
        assert who in message
        assert not who or message.startswith("step 4: copies of the weights")


def test_every_bit_counts_in_the_checksum() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = torch.randn(5, generator=torch.Generator().manual_seed(0)).to(dtype)
        bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
        before = checksum(tensor)
        for place in range(5):
            for bit in range(8 * tensor.itemsize - 1):
                bits[place] ^= 1 << bit
                assert checksum(tensor) != before
                bits[place] ^= 1 << bit
        assert checksum(tensor) == before


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(dp_shard=2)])
def test_a_run_without_copies_has_none_to_compare(cache: Path, mesh: MeshSpec) -> None:
    run = tiny_run(cache, check_replicas_every=2, mesh=mesh)
    with pytest.raises(ValueError, match=r"the run has one copy of the weights; set mesh\.dp_rep"):
        run.check(mesh.dp_shard)
