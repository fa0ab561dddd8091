"""Silent corruption: copies of the weights that must be equal are compared, bit for bit."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import Ranks
from trainer.errors import CorruptionError
from trainer.mesh import Mesh
from trainer.protocols import Engine

_MIX = 1_000_003  # odd: no bit of a sum gets lost


def check_copies(every: int | None, axes: dict[str, int], *, shards: bool) -> None:
    """Raise ValueError where there are no copies to compare. `shards`: the engine cuts them up."""
    if every is not None and (axes["dp_replicate"] == 1 or shards):
        found = "an engine that shards them itself" if shards else "one copy of the weights"
        raise ValueError(
            f"check_replicas_every={every} compares copies, and the run has {found}; set "
            "mesh.dp_replicate to 2 or more with engine=native, or check_replicas_every=null"
        )


class Replicas:
    """Compares a checksum of this rank's weights with those of the other copies, every few steps.

    One flipped bit changes it. A copy that differs goes on differing: its gradients are of other
    weights, and all copies take them.
    """

    def __init__(self, every: int | None, ranks: Ranks, mesh: Mesh) -> None:
        self.every, self.ranks, self.mesh = every, ranks, mesh

    def check(self, step: int, engine: Engine) -> None:
        """Raise CorruptionError on every rank where copies differ. Collective in every few steps.

        sync: the checksum is read, which waits for the step.
        """
        if self.every is None or step % self.every:
            return
        pieces = engine.weights()
        total = torch.zeros((), dtype=torch.int64, device=self.ranks.device)
        for name in sorted(pieces):
            total = total * _MIX + checksum(pieces[name].local)
        # Which of the others hold the same: all but the copies' axis says so.
        place = [self.mesh.rank(axis) for axis in ("pp", "dp_shard", "tp")]
        if self.mesh.is_sharded:  # else ranks of cp hold copies too
            place.append(self.mesh.rank("cp"))
        found = self._of_all(place + [0] * (4 - len(place)) + [int(total)])
        for own in {row[:4] for row in found}:
            sums = {rank: row[4] for rank, row in enumerate(found) if row[:4] == own}
            if len(set(sums.values())) > 1:
                raise CorruptionError(_explain(step, sums))

    def _of_all(self, numbers: list[int]) -> list[tuple[int, ...]]:
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.ranks.placement.world_size)]
        dist.all_gather(rows, own, group=self.ranks.control_group)
        return [tuple(row.tolist()) for row in rows]


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of the elements' bits as whole numbers: no order changes it."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)


def _explain(step: int, sums: dict[int, int]) -> str:
    (common, votes), *_ = Counter(sums.values()).most_common()
    odd = [rank for rank, value in sums.items() if value != common]
    if votes * 2 > len(sums):
        who = f"rank {', '.join(map(str, odd))} differs from the {votes} others"
    else:
        who = f"ranks {', '.join(map(str, sums))} differ, and no majority says which is right"
    return (
        f"step {step}: copies of the weights are not the same bits: {who}; start again on other "
        "nodes, and test the memory of these"
    )
