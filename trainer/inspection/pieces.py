"""The documents of a row: where each begins and ends, where it comes from, what it is to answer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.batch import Batch
from trainer.data.examples import PREFERENCE, Labels, is_none

PADDING = 0  # its segment
_PLACE = re.compile(r"([^,\[]+)\[(\d+):(\d+)\]")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of one segment: a document, the part of one that the row holds, or padding."""

    segment: int
    start: int
    """Its first place in the row."""
    stop: int
    """The place behind its last."""
    provenance: str
    """`source[first:last]`; empty for padding."""
    num_targets: int
    answers: tuple[str, ...]
    """The classes of the whole document, or its numbers."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_padding(self) -> bool:
        return self.segment == PADDING

    @property
    def source(self) -> str:
        return self.provenance.partition("[")[0]


def pieces_of(batch: Batch, row: int, labels: Labels | None) -> list[Piece]:
    """Return the runs of a row; `labels` are those of the data."""
    segments = batch.segment_ids[row].numpy()
    borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    runs = [(int(segments[start]), start, stop) for start, stop in pairwise(borders)]
    has_pairs = labels is not None and labels.problem_type == PREFERENCE
    num_texts = sum(segment != PADDING for segment, _, _ in runs)
    places = _places(batch, row, num_texts, 2 if has_pairs else 1)
    pieces = []
    for segment, start, stop in runs:
        answers: tuple[str, ...] = ()
        targets = batch.labels[row, start:stop].numpy()
        if batch.class_labels is not None and labels and segment != PADDING:
            targets = batch.class_labels[row, (segment - 1) // (1 + has_pairs)].numpy()
            answers = (("chosen", "rejected")[(segment - 1) % 2],)
            if not has_pairs:
                answers = _answers(targets, labels)
        piece = Piece(
            segment=segment, start=start, stop=stop, answers=answers,
            provenance="" if segment == PADDING else next(places),
            num_targets=int((~is_none(targets)).sum()),
        )  # fmt: skip
        pieces.append(piece)
    return pieces


def _places(batch: Batch, row: int, count: int, texts_each: int) -> Iterator[str]:
    """Yield where each of `count` texts of a row comes from, or the whole row where that is not
    known; a document is `texts_each` of them."""
    whole = batch.provenance[row] if row < len(batch.provenance) else ""
    each = [
        f"{source}[{n}:{n + 1}]"
        for source, first, last in _PLACE.findall(whole)
        for n in range(int(first), int(last))
        for _ in range(texts_each)
    ]
    # An empty document has a place and no segment: which one that is cannot be told.
    return iter(each if len(each) == count else [whole] * count)


def _answers(targets: np.ndarray, labels: Labels) -> tuple[str, ...]:
    """Return the names of a document's classes, or its numbers; none where it has no target."""
    known = np.flatnonzero(~is_none(targets))
    if labels.problem_type == "single_label_classification":
        return tuple(labels.names[targets] for _ in known)
    if labels.problem_type == "regression":
        return tuple(f"{labels.names[k]}={targets[k]:g}" for k in known)
    return tuple(labels.names[k] for k in known if targets[k])
