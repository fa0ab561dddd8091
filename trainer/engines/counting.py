"""What a step has, targets above all: counted over all ranks, before the first backward."""

import torch
from torch import Tensor

from models.nn.head import Loss
from trainer.batch import Batch
from trainer.mesh import Mesh


def count_step(
    micro_batches: list[Batch], num_tokens: int, mesh: Mesh, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return (targets, tokens, onlookers, images) of the step over all data ranks, and the targets
    of each source as `Batch.by_source`. Collective.

    `num_tokens` are those of this rank's rows, padding left out.
    """
    # full, not tensor: a fill on the device, where a copy from the host would wait.
    tokens = torch.full((1,), num_tokens, dtype=torch.int64, device=device)
    found = [batch.counts() for batch in micro_batches]
    counts = torch.cat([tokens, found[0] if len(found) == 1 else torch.stack(found).sum(0)])
    if mesh.rank("cp") > 0:
        counts.zero_()  # the same rows as the first rank's: counted there
    tokens, targets, onlookers, images = mesh.sum_over_tokens(counts)[:4].unbind()
    return (targets, tokens, onlookers, images), counts[4:].double()


def no_loss(batch: Batch, device: torch.device) -> Tensor:
    """Return zeros, to which the `loss_sums` of batches like this one are added."""
    return torch.zeros(1 + batch.num_sources, dtype=torch.float64, device=device)


def loss_sums(loss: Loss, batch: Batch) -> Tensor:
    """Return (1 + sources,) fp64: the loss sum of this rank's batch, and that of each source as
    `Batch.by_source`."""
    total = loss.sum.double().view(1)
    if batch.sources is None:
        return total
    assert loss.each is not None
    return torch.cat((total, batch.by_source(loss.each)))
