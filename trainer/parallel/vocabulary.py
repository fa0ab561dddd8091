"""The vocabulary split over tensor-parallel ranks: lookups and cross-entropy of a share of it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.head import IGNORED, LMHead
from trainer.parallel.collectives import stacked
from trainer.pieces import Rows


class SplitVocabulary:
    """This rank's rows [first, last) of the main vocabulary, and all additional ones.

    Additional rows (a decoupled vocabulary) are on every rank; the last rank alone uses them, so
    that their gradients are summed over ranks as those of any shared parameter.
    """

    def __init__(self, size: int, additional: int, group: dist.ProcessGroup) -> None:
        """`size` counts the main rows. They need not divide: the first ranks hold one more."""
        self.size, self.additional, self.group = size, additional, group
        parts = torch.arange(size).tensor_split(group.size())
        self.counts = [len(part) for part in parts]
        self.first = sum(self.counts[: group.rank()])
        self.last = self.first + self.counts[group.rank()]
        self.is_last = group.rank() == group.size() - 1

    @property
    def rows(self) -> Rows:
        return Rows(start=self.first, stop=self.last)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return each id's row here (0 where it has none), and whether it has one."""
        is_here = (ids >= self.first) & (ids < self.last)
        rows = ids - self.first
        if self.additional and self.is_last:
            is_additional = ids >= self.size
            rows = torch.where(is_additional, ids - self.size + self.last - self.first, rows)
            is_here = is_here | is_additional
        return rows.masked_fill(~is_here, 0), is_here

    def gradient(
        self, logits_XV: Tensor, labels_X: Tensor, scale_X1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As of the whole vocabulary; one all-gather of three numbers per token."""
        dtype = logits_XV.dtype
        wide_XV = logits_XV.to(torch.promote_types(dtype, torch.float32))
        wide_XV, rows_X1, is_here_X1, log_sum_X1, nll_X1 = self._reduced(wide_XV, labels_X)
        is_target_X1 = (labels_X != IGNORED)[:, None]
        nll_X1 = torch.where(is_target_X1, nll_X1, 0.0)
        grad_XV = wide_XV.sub_(log_sum_X1).exp_()
        grad_XV.scatter_add_(1, rows_X1, -is_here_X1.to(grad_XV.dtype))
        if scale_X1 is not None:
            grad_XV.mul_(scale_X1)
        return nll_X1[:, 0], grad_XV.masked_fill_(~is_target_X1, 0.0).to(dtype)

    def nll_sum(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        return self.nll(logits_XV, labels_X).sum()

    def nll(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        *_, nll_X1 = self._reduced(logits_XV, labels_X)
        return torch.where(labels_X != IGNORED, nll_X1[:, 0], 0.0)

    def _reduced(
        self, logits_XV: Tensor, labels_X: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return own logits, the labels' rows and whether here, log of sum exp, and nll."""
        if self.additional and not self.is_last:
            logits_XV[:, -self.additional :] = -torch.inf
        rows_X1, is_here_X1 = (found[:, None] for found in self.local(labels_X.clamp(min=0)))
        top_X1 = logits_XV.amax(-1, keepdim=True)
        sum_X1 = (logits_XV - top_X1).exp_().sum(-1, keepdim=True)
        target_X1 = torch.where(is_here_X1, logits_XV.gather(1, rows_X1), 0.0)
        own_X3 = torch.cat((top_X1, sum_X1, target_X1), dim=1)
        tops, sums, targets = stacked(own_X3, self.group).unbind(-1)
        top_X = tops.amax(0)
        log_sum_X1 = (top_X + (sums * (tops - top_X).exp()).sum(0).log())[:, None]
        return logits_XV, rows_X1, is_here_X1, log_sum_X1, log_sum_X1 - targets.sum(0)[:, None]

    def whole(self, logits_XV: Tensor) -> Tensor:
        """Return all logits, on every rank; they carry no gradient."""
        main, width = self.last - self.first, max(self.counts)
        own = F.pad(logits_XV.detach()[..., :main], (0, width - main))
        parts = stacked(own, self.group)
        cut = [part[..., :count] for part, count in zip(parts, self.counts, strict=True)]
        return torch.cat((*cut, logits_XV.detach()[..., main:]), dim=-1)


def split_embedding(
    embedding: nn.Embedding, vocabulary: SplitVocabulary, reduce: Callable[[Tensor], Tensor]
) -> None:
    """Look up what is here, in place; `reduce` adds up what the ranks found."""
    lookup: Callable[[Tensor], Tensor] = embedding.forward
    embedding.num_embeddings = vocabulary.last - vocabulary.first
    padding = embedding.padding_idx
    if padding is not None:
        is_here = vocabulary.first <= padding < vocabulary.last
        embedding.padding_idx = padding - vocabulary.first if is_here else None

    def forward(ids_BT: Tensor) -> Tensor:
        rows_BT, is_here_BT = vocabulary.local(ids_BT)
        # No row's gradient may come from ids that are elsewhere, whose row here is a stand-in.
        return reduce(lookup(rows_BT).masked_fill(~is_here_BT[..., None], 0.0))

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def split_head(head: LMHead, vocabulary: SplitVocabulary) -> None:
    """Let the head compute the logits of this rank's rows, in place."""
    head.vocabulary = vocabulary
    head.out_features = vocabulary.last - vocabulary.first
