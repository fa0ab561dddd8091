"""How many targets a step has: counted over all ranks, before the first backward."""

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.mesh import Mesh


def count_step(
    micro_batches: list[Batch], num_tokens: int, mesh: Mesh, device: torch.device
) -> Tensor:
    """Return (targets, tokens) of the step over all data ranks. Collective.

    `num_tokens` are those of this rank's rows, padding left out.
    """
    targets = torch.stack([batch.num_targets() for batch in micro_batches]).sum()
    # full, not tensor: a fill on the device, where a copy from the host would wait.
    tokens = torch.full((), num_tokens, dtype=torch.int64, device=device)
    counts = torch.stack([targets, tokens])
    if mesh.rank("cp") > 0:
        counts.zero_()  # the same rows as the first rank's: counted there
    return mesh.sum_over_tokens(counts)
