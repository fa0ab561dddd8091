"""Documents packed within a step: the same targets with packing on or off, on any number of ranks.

Every rank knows the lengths of all documents of a step, so all come to the same rows, and each
reads those of its own micro-batches.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.data.document_store import DocumentStore
from trainer.data.examples import Example
from trainer.data.packing import best_fit
from trainer.data.row_filling import Dealt, Locate
from trainer.data.rows import COLUMNS
from trainer.data.tokens import TokenStore
from trainer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.data.images.batches import ImageBatches


class PackedDocuments:
    """Rows that hold several documents each, or one; what is longer than a row is cut."""

    unit = "documents"

    def __init__(
        self,
        store: DocumentStore,
        row_tokens: int,
        *,
        is_packed: bool,
        virtual_ids: Sequence[int] = (),
        is_text: bool = False,
        images: "ImageBatches | None" = None,
    ) -> None:
        """`virtual_ids` begin every document; `is_text`: what is learnt of a token is the next."""
        self.store: TokenStore = store
        self._documents, self._images = store, images
        self.row_tokens, self.is_packed = row_tokens, is_packed
        self.virtual_ids, self.is_text = np.array(virtual_ids, np.int64), is_text
        self.num_virtual = len(virtual_ids)

    @property
    def counts(self) -> list[int]:
        return self.store.per_part(self.store.first_documents)

    def num_tokens(self, samples: list[int]) -> int:
        return sum(map(self._documents.length, samples))

    def share(self, samples: range, *, micro_rows: int, rank: int, num_ranks: int) -> list[range]:
        """Return all samples: which are whose is known when their lengths have been read."""
        return [samples]

    def deal(
        self, samples: range, locate: Locate, *, micro_rows: int, rank: int, num_ranks: int
    ) -> Dealt:
        """Return one rank's micro-batches; the last ones may hold rows of padding alone."""
        found, row_of = self.rows_of(locate(np.array(samples, np.int64)))
        order = np.argsort(row_of, kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(row_of))[:-1])
        stride = num_ranks * micro_rows
        most = int(np.bincount(row_of).max())  # of the step: all its micro-batches have one shape
        for first in range(rank * micro_rows, -(-len(rows) // stride) * stride, stride):
            own = [row.tolist() for row in rows[first : first + micro_rows]]
            held = [[found[place] for place in row] for row in own]
            batch = self._batch(held, micro_rows, most)
            if self._images is not None:
                start = first - rank * micro_rows  # of the micro-batches that ranks have together
                together = [found[place] for row in rows[start : start + stride] for place in row]
                batch = self._images.added(batch, held, together)
            numbers = sorted(samples[place] for row in own for place in row)
            yield batch, _ranges(numbers)

    def rows_of(self, documents: list[int]) -> tuple[tuple[int, ...], np.ndarray]:
        """Return what stands for each document of a step, and its row."""
        found, whole = zip(*map(self._instead, documents), strict=True)
        lengths = np.minimum(np.array(whole) + self.num_virtual, self.row_tokens)
        if self._images is not None:
            limit = self.row_tokens if self.is_packed else None
            return found, self._images.rows_of(found, lengths, limit)
        is_packed = self.is_packed
        return found, best_fit(lengths, self.row_tokens) if is_packed else np.arange(len(found))

    def _instead(self, document: int) -> tuple[int, int]:
        """Return the document, or the next one of its part that is no bad row; and its length.

        No other document moves.
        """
        number, own = self.store.part_of(document)
        for _ in own:
            if length := self._documents.length(document):
                return document, length
            document = document + 1 if document + 1 in own else own.start
        raise DataError(f"{self.store.parts[number].folder} holds bad rows alone; correct the data")

    def example(self, document: int) -> Example:
        """Return a document behind its virtual tokens, whose targets are those of peft's loss.

        Of a document that is learnt from end to end, the last virtual token predicts the first.
        """
        example = self._documents.example(document)
        if not self.num_virtual:
            return example
        labels = example.labels
        if labels is not None:
            before = np.full(self.num_virtual, IGNORED, np.int64)
            if self.is_text and (labels[:-1] != IGNORED).all():
                before[-1] = example.input_ids[0]
            labels = np.concatenate((before, labels))
        ids = np.concatenate((self.virtual_ids, example.input_ids))
        return replace(example, input_ids=ids, labels=labels)

    def num_images(self, document: int) -> int:
        return self._documents.num_images(document)

    def with_images(self, batch: Batch, rows: list[list[int]], together: list[int]) -> Batch:
        """Return a batch with the images of its rows' documents; see ImageBatches.added."""
        return batch if self._images is None else self._images.added(batch, rows, together)

    def pictures(self, document: int, ids: list[int]) -> "list[Image]":
        """Return the images whose places are among the first tokens `ids` of a document."""
        return [] if self._images is None else self._images.pictures(document, ids)

    def _batch(self, rows: list[list[int]], num_rows: int, most: int) -> Batch:
        """Return documents as a batch of `num_rows` rows, with classes for `most` in each row."""
        columns = {name: np.zeros((num_rows, self.row_tokens), np.int64) for name in COLUMNS}
        columns["labels"].fill(IGNORED)
        none = self._documents.no_class
        has_pairs = self._documents.has_pairs
        if none is not None and has_pairs:
            none = none[0]  # of a pair the head sees the tokens of its prompt
        classes = None if none is None else np.tile(none, (num_rows, most, *([1] * none.ndim)))
        targets = columns["labels"] if classes is None else classes
        sources = np.zeros(targets.shape[:2], np.int64) if self.store.num_sources else None
        for place, documents in enumerate(rows):
            first = segment = 0
            for number, document in enumerate(documents):
                example = self.example(document)
                length = min(len(example.input_ids), self.row_tokens)
                run = slice(first, first + length)
                columns["input_ids"][place, run] = example.input_ids[:length]
                for start, stop in pairwise(_borders(example, length, has_pairs)):
                    part, segment = slice(first + start, first + stop), segment + 1
                    columns["position_ids"][place, part] = np.arange(stop - start)
                    columns["segment_ids"][place, part] = segment
                if example.labels is not None:
                    columns["labels"][place, run] = example.labels[:length]
                if classes is not None:
                    assert example.classes is not None
                    classes[place, number] = example.classes[0] if has_pairs else example.classes
                if sources is not None:
                    own = run if classes is None else number
                    sources[place, own] = self.store.part_of(document)[0]
                first += length
        tensors: dict[str, Any] = {
            name: torch.from_numpy(column) for name, column in columns.items()
        }
        return Batch(
            **tensors,
            class_labels=None if classes is None else torch.from_numpy(classes),
            sources=None if sources is None else torch.from_numpy(sources),
            num_sources=self.store.num_sources,
            provenance=tuple(",".join(self.store.cite(n, n + 1) for n in row) for row in rows),
        )


def _borders(example: Example, length: int, has_pairs: bool) -> list[int]:
    """Return where the texts of a document begin and end."""
    if not has_pairs:
        return [0, length]
    assert example.classes is not None
    return [0, int(example.classes[1]), length]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges [first, last)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
