"""What a step has, targets above all: counted over all ranks, before the first backward."""

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.mesh import Mesh


def count_step(
    micro_batches: list[Batch], num_tokens: int, mesh: Mesh, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (targets, tokens, onlookers, images) of the step over all data ranks. Collective.

    `num_tokens` are those of this rank's rows, padding left out.
    """
    targets = torch.stack([batch.num_targets() for batch in micro_batches]).sum()
    # full, not tensor: a fill on the device, where a copy from the host would wait.
    tokens = torch.full((), num_tokens, dtype=torch.int64, device=device)
    looks = torch.stack([batch.looks() for batch in micro_batches]).sum(0)
    counts = torch.cat([torch.stack([targets, tokens]), looks])
    if mesh.rank("cp") > 0:
        counts.zero_()  # the same rows as the first rank's: counted there
    targets, tokens, onlookers, images = mesh.sum_over_tokens(counts)
    return targets, tokens, onlookers, images
