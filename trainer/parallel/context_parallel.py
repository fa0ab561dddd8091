"""Context parallelism: each rank has some tokens of every row, and sees the keys of all.

A row is cut into 2n chunks; rank r of n has chunks r and 2n - 1 - r, so that under a causal mask
every rank has the same work. Keys and values are gathered, which grouped heads make small. Source:
Grattafiori et al. 2024 (Llama 3), section 3.3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.nn.backends import Backend
from models.nn.classifiers import SequenceClassifier
from models.nn.head import IGNORED
from models.nn.segments import Segments
from trainer.batch import Batch
from trainer.parallel.collectives import TOKENS, gathered


def own_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's two chunks of (B, T, ..), end to end; T must divide by 2 * ranks."""
    chunks = x.chunk(2 * group.size(), TOKENS)
    return torch.cat((chunks[group.rank()], chunks[-1 - group.rank()]), TOKENS)


def in_order(x: Tensor, size: int) -> Tensor:
    """Return the ranks' tokens, gathered end to end, in the order of the row."""
    chunks = x.chunk(2 * size, TOKENS)
    return torch.cat((*chunks[0::2], *reversed(chunks[1::2])), TOKENS)


def as_held(x: Tensor, size: int) -> Tensor:
    """Return the tokens of a row as the ranks hold them, end to end: undoes `in_order`."""
    chunks = x.chunk(2 * size, TOKENS)
    return torch.cat([chunks[i] for rank in range(size) for i in (rank, -1 - rank)], TOKENS)


def all_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the whole row of (B, t, ..); gradients of a token add up over the ranks."""
    return in_order(gathered(x, group), group.size())


def share(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """Return this rank's tokens of a micro-batch; labels are shifted already, so none is lost."""
    images, sources = batch.image_attention_mask, batch.sources
    if sources is not None and batch.class_labels is None:
        sources = own_tokens(sources, group)
    return replace(
        batch,
        sources=sources,
        input_ids=own_tokens(batch.input_ids, group),
        labels=own_tokens(batch.labels, group),
        position_ids=own_tokens(batch.position_ids, group),
        segment_ids=own_tokens(batch.segment_ids, group),
        image_attention_mask=None if images is None else own_tokens(images, group),
    )


@dataclass(frozen=True)
class _HalfMasks:
    """For each of this rank's two chunks: how many keys it may see at most, and its mask."""

    stops: tuple[int, int]
    masks: tuple[Any, Any]


class ContextParallel:
    """A back-end over another one: queries are this rank's, keys those of all ranks."""

    def __init__(self, backend: Backend, group: dist.ProcessGroup) -> None:
        self.backend, self.group = backend, group

    def prepare(self, segments: Segments) -> Any:
        if not (segments.is_self and segments.causal):
            return self.backend.prepare(segments)  # cross-attention: every rank has all the keys
        size, rank = self.group.size(), self.group.rank()
        whole = all_tokens(segments.query, self.group)
        width = whole.shape[1] // (2 * size)
        stops = ((rank + 1) * width, (2 * size - rank) * width)
        masks = []
        for stop in stops:
            slots = torch.arange(stop - width, stop, device=whole.device)
            query, key = whole[:, stop - width : stop], whole[:, :stop]
            chunk = Segments(query=query, key=key, causal=True, slots=slots)
            masks.append(self.backend.prepare(chunk))
        return _HalfMasks(stops, (masks[0], masks[1]))

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: Any,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        if not isinstance(mask, _HalfMasks):
            return self.backend.attend(
                query_BNTH, key_BKSH, value_BKSH, mask, dropout=dropout, scale=scale
            )
        both = torch.stack((key_BKSH, value_BKSH)).movedim(3, TOKENS)  # one message for the two
        keys, values = all_tokens(both, self.group).movedim(TOKENS, 3).unbind(0)
        parts = [
            self.backend.attend(
                query, keys[:, :, :stop], values[:, :, :stop], own, dropout=dropout, scale=scale
            )
            for query, stop, own in zip(query_BNTH.chunk(2, 2), mask.stops, mask.masks, strict=True)
        ]
        return torch.cat(parts, 2)


def share_context(
    model: nn.Module,
    group: dist.ProcessGroup,
    attention: Callable[[Backend, dist.ProcessGroup], Backend] = ContextParallel,
) -> None:
    """Let self-attention see the keys of all ranks, in place; the rest works token by token.

    `attention` is what is put over each back-end.
    """
    shared: dict[int, Backend] = {}
    for module in model.modules():
        backend = getattr(module, "backend", None)
        if backend is not None:
            own = shared.setdefault(id(backend), attention(backend, group))
            setattr(module, "backend", own)  # noqa: B010  no field that types know
        if isinstance(module, SequenceClassifier):
            module.forward = _whole_rows(module, group)  # type: ignore[method-assign]


def _whole_rows(head: SequenceClassifier, group: dist.ProcessGroup) -> Any:
    """Return the head's forward over whole rows: the last token of a segment may be elsewhere."""
    score = head.forward

    def forward(
        hidden_BTD: Tensor,
        segment_ids_BT: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        max_segments: int = 1,
    ) -> Any:
        hidden, segments = (all_tokens(x, group) for x in (hidden_BTD, segment_ids_BT))
        if labels is not None and group.rank() > 0:
            # Every rank sees every answer: the first alone counts them.
            labels = torch.full_like(
                labels, float("nan") if labels.is_floating_point() else IGNORED
            )
        return score(hidden, segments, labels, scale, max_segments)

    return forward
