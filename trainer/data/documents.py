"""Documents packed within a step: the same targets with packing on or off, on any number of ranks.

Every rank knows the lengths of all documents of a step, so all come to the same rows, and each
reads those of its own micro-batches.
"""

from bisect import bisect_right

import numpy as np
import torch

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.data.examples import Example
from trainer.data.loader import Dealt, Locate
from trainer.data.packing import best_fit
from trainer.data.rows import COLUMNS
from trainer.data.shards import STARTS
from trainer.data.tokens import TokenStore
from trainer.errors import DataError

LABELS = "labels"  # section of a shard: the target of each token, already shifted


class DocumentStore(TokenStore):
    """A store whose shards say what is to be learnt of each token."""

    def lengths(self, documents: list[int]) -> np.ndarray:
        """Return how many tokens each document has; 0: a bad row stood there."""
        return np.array([stop - start for _, start, stop in map(self._place, documents)], np.int64)

    def all_lengths(self) -> np.ndarray:
        """Return the length of every document, in order."""
        shards = map(self.shard, range(len(self.entries)))
        starts = [shard.read(STARTS, 0, shard.footer.num_documents + 1) for shard in shards]
        return np.concatenate([np.diff(one) for one in starts])

    def example(self, document: int) -> Example:
        number, start, stop = self._place(document)
        shard = self.shard(number)
        return Example(
            input_ids=shard.tokens(start, stop).astype(np.int64),
            labels=shard.read(LABELS, start, stop).astype(np.int64),
        )

    def _place(self, document: int) -> tuple[int, int, int]:
        """Return the shard of a document and its tokens [start, stop) there."""
        number = bisect_right(self.first_documents, document) - 1
        local = document - self.first_documents[number]
        start, stop = self.shard(number).read(STARTS, local, local + 2).tolist()
        return number, start, stop


class PackedDocuments:
    """Rows that hold several documents each, or one; what is longer than a row is cut."""

    unit = "documents"

    def __init__(self, store: DocumentStore, row_tokens: int, *, is_packed: bool) -> None:
        self.store: TokenStore = store
        self._documents = store
        self.row_tokens, self.is_packed = row_tokens, is_packed

    @property
    def num_samples(self) -> int:
        return self.store.num_documents

    def share(self, samples: range, *, micro_rows: int, rank: int, num_ranks: int) -> list[range]:
        """Return all samples: which are whose is known when their lengths have been read."""
        return [samples]

    def deal(
        self, samples: range, locate: Locate, *, micro_rows: int, rank: int, num_ranks: int
    ) -> Dealt:
        """Return one rank's micro-batches; the last ones may hold rows of padding alone."""
        documents = locate(np.array(samples, np.int64))
        found = [self._instead(document) for document in documents]
        lengths = np.minimum(self._documents.lengths(found), self.row_tokens)
        row_of = best_fit(lengths, self.row_tokens) if self.is_packed else np.arange(len(found))
        order = np.argsort(row_of, kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(row_of))[:-1])
        stride = num_ranks * micro_rows
        dealt = []
        for first in range(rank * micro_rows, -(-len(rows) // stride) * stride, stride):
            own = [row.tolist() for row in rows[first : first + micro_rows]]
            batch = self._batch([[found[place] for place in row] for row in own], micro_rows)
            numbers = sorted(samples[place] for row in own for place in row)
            dealt.append((batch, _ranges(numbers)))
        return dealt

    def _instead(self, document: int) -> int:
        """Return the document, or the next one that is no bad row: places never shift."""
        count = self.store.num_documents
        for _ in range(count):
            if self._documents.lengths([document])[0]:
                return document
            document = (document + 1) % count
        raise DataError(f"{self.store.folder} holds bad rows alone; correct the data")

    def _batch(self, rows: list[list[int]], num_rows: int) -> Batch:
        columns = {name: np.zeros((num_rows, self.row_tokens), np.int64) for name in COLUMNS}
        columns["labels"].fill(IGNORED)
        provenance = []
        for place, documents in enumerate(rows):
            first = 0
            for segment, document in enumerate(documents, start=1):
                example = self._documents.example(document)
                length = min(len(example.input_ids), self.row_tokens)
                assert example.labels is not None
                run = slice(first, first + length)
                columns["input_ids"][place, run] = example.input_ids[:length]
                columns["labels"][place, run] = example.labels[:length]
                columns["position_ids"][place, run] = np.arange(length)
                columns["segment_ids"][place, run] = segment
                first += length
            provenance.append(",".join(f"{self.store.name}[{n}:{n + 1}]" for n in documents))
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return Batch(**tensors, provenance=tuple(provenance))


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges [first, last)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
