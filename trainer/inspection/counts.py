"""A step in numbers: documents, targets, padding, sources, classes, lengths."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.data.examples import PREFERENCE, Labels, is_none
from trainer.data.spelling import Speller
from trainer.inspection.images import num_astray
from trainer.inspection.pieces import Piece, pieces_of


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What a step has of one source."""

    num_documents: int = 0
    num_tokens: int = 0
    num_targets: int = 0


class RowCounts(NamedTuple):
    """What one row of a step holds."""

    num_documents: int
    num_tokens: int
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A step in numbers."""

    num_micro_batches: int
    num_rows: int
    row_tokens: int
    documents: list[Piece]
    """Or the parts of documents that rows hold."""
    num_targets: int
    num_behind: int
    """Targets that are the token behind a row."""
    num_astray: int
    """Targets that are not the next token of their document: a defect of the data."""
    rows: list[RowCounts]
    num_lookers: int
    """Tokens that look at an image."""
    num_looks_astray: int
    """Tokens that look at an image of another document, or at a later one: a defect of the data."""
    classes: Counter[str]
    """How often each class is a target."""
    tokens_per_byte: float | None
    """Of the documents' UTF-8 text, special tokens left out; None: there is no text."""

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.documents)

    @property
    def num_padding(self) -> int:
        return self.num_rows * self.row_tokens - self.num_tokens

    @property
    def num_images(self) -> int:
        return sum(row.num_images for row in self.rows)

    @property
    def sources(self) -> dict[str, SourceCounts]:
        found: dict[str, SourceCounts] = {}
        for piece in sorted(self.documents, key=lambda piece: piece.source):
            so_far = found.get(piece.source, SourceCounts())
            found[piece.source] = SourceCounts(
                num_documents=so_far.num_documents + 1,
                num_tokens=so_far.num_tokens + piece.num_tokens,
                num_targets=so_far.num_targets + piece.num_targets,
            )
        return found

    @property
    def longest(self) -> list[Piece]:
        """All documents, the longest first."""
        return sorted(self.documents, key=lambda piece: -piece.num_tokens)

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """How many documents have `first` to `last` tokens: (1, 1, n), (2, 3, n), (4, 7, n), .."""
        bits = Counter(piece.num_tokens.bit_length() for piece in self.documents)
        bins = range(min(bits, default=1), max(bits, default=0) + 1)
        return [(1 << bit - 1, min((1 << bit) - 1, self.row_tokens), bits[bit]) for bit in bins]


def count(batches: list[Batch], labels: Labels | None, tokenizer: Speller) -> Counts:
    """Count what the micro-batches of a step hold; `labels` are those of the data."""
    documents = [
        (piece, batch.input_ids[row, piece.start : piece.stop].tolist())
        for batch in batches
        for row in range(batch.num_rows)
        for piece in pieces_of(batch, row, labels)
        if not piece.is_padding
    ]
    is_text = labels is None
    return Counts(
        num_micro_batches=len(batches),
        num_rows=sum(batch.num_rows for batch in batches),
        row_tokens=batches[0].input_ids.shape[1],
        documents=[piece for piece, _ in documents],
        num_targets=sum(int(batch.num_targets()) for batch in batches),
        num_behind=sum(map(_num_behind, batches)) if is_text else 0,
        num_astray=sum(map(_num_astray, batches)) if is_text else 0,
        rows=[row for batch in batches for row in _rows(batch)],
        num_lookers=sum(int(batch.looks()[0]) for batch in batches),
        num_looks_astray=sum(num_astray(batch, tokenizer) for batch in batches),
        classes=sum((_classes(batch, labels) for batch in batches), Counter()),
        tokens_per_byte=_tokens_per_byte([ids for _, ids in documents], tokenizer),
    )


def _rows(batch: Batch) -> list[RowCounts]:
    segments = batch.segment_ids
    images = torch.zeros(batch.num_rows)
    if batch.image_attention_mask is not None:
        images = (batch.image_attention_mask != 0).any(1).sum(1)
    numbers = (segments.amax(1), (segments > 0).sum(1), images)
    return [RowCounts(*map(int, row)) for row in zip(*numbers, strict=True)]


def _num_behind(batch: Batch) -> int:
    return int((batch.labels[:, -1] != IGNORED).sum())


def _num_astray(batch: Batch) -> int:
    is_target = batch.labels[:, :-1] != IGNORED
    is_next = batch.labels[:, :-1] == batch.input_ids[:, 1:]
    is_inside = batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]
    return int((is_target & ~(is_next & is_inside)).sum())


def _classes(batch: Batch, labels: Labels | None) -> Counter[str]:
    """Count the classes of a batch; text, numbers and pairs have none."""
    if labels is None or labels.problem_type in ("regression", PREFERENCE):
        return Counter()
    targets = batch.targets.numpy()
    if labels.problem_type == "multi_label_classification":
        return Counter(dict(zip(labels.names, (targets == 1).sum((0, 1)).tolist(), strict=True)))
    return Counter(labels.names[target] for target in targets[~is_none(targets)].tolist())


def _tokens_per_byte(documents: list[list[int]], tokenizer: Speller) -> float | None:
    special = list(tokenizer.special_ids)
    num_tokens = sum(int((~np.isin(ids, special)).sum()) for ids in documents)
    num_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
    return num_tokens / num_bytes if num_bytes else None
