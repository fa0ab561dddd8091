"""Concat-and-split: cut token streams into rows that know their document borders."""

from bisect import bisect_right
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.data.row_filling import Dealt, Locate
from trainer.data.tokens import TokenStore

COLUMNS = ("input_ids", "labels", "position_ids", "segment_ids")
SOURCES = "sources"  # a further column, of several sources


class PackedRows:
    """The rows of a token store: row i of a shard is its tokens [i*T, (i+1)*T); its last is padded.

    Rows are counted through all shards; none crosses from one shard to the next. A document cut by
    a row border goes on in the next row as a segment of its own. Every token that has a predecessor
    in its document is a target exactly once.
    """

    unit = "rows"
    num_virtual = 0

    def __init__(self, store: TokenStore, row_tokens: int) -> None:
        self.store, self.row_tokens = store, row_tokens
        counts = (-(-entry.num_tokens // row_tokens) for entry in store.entries)
        self._first_rows = [0, *accumulate(counts)]
        self.num_rows = self._first_rows[-1]

    @property
    def counts(self) -> list[int]:
        return self.store.per_part(self._first_rows)

    def num_tokens(self, samples: list[int]) -> int:
        return sum(stop - start for _, start, stop in map(self._place, samples))

    def share(self, samples: range, *, micro_rows: int, rank: int, num_ranks: int) -> list[range]:
        """Return one rank's samples, one range for each micro-batch."""
        return [
            samples[first + rank * micro_rows : first + (rank + 1) * micro_rows]
            for first in range(0, len(samples), num_ranks * micro_rows)
        ]

    def deal(
        self, samples: range, locate: Locate, *, micro_rows: int, rank: int, num_ranks: int
    ) -> Dealt:
        """Return one rank's micro-batches: sample i is row locate(i), and each has micro_rows."""
        own = self.share(samples, micro_rows=micro_rows, rank=rank, num_ranks=num_ranks)
        rows = iter(locate(np.array([sample for part in own for sample in part], np.int64)))
        return [
            (self.batch(list(islice(rows, len(part))), micro_rows), [(part.start, part.stop)])
            for part in own
        ]

    def batch(self, rows: list[int], num_rows: int) -> Batch:
        """Return `rows` as one Batch of `num_rows` rows; missing ones are padding."""
        num_sources = self.store.num_sources
        names = (*COLUMNS, SOURCES) if num_sources else COLUMNS
        columns = {name: np.zeros((num_rows, self.row_tokens), np.int64) for name in names}
        columns["labels"].fill(IGNORED)
        provenance = [
            self._fill({name: column[place] for name, column in columns.items()}, row)
            for place, row in enumerate(rows)
        ]
        tensors: dict[str, Any] = {
            name: torch.from_numpy(column) for name, column in columns.items()
        }
        return Batch(**tensors, num_sources=num_sources, provenance=tuple(provenance))

    def _fill(self, columns: dict[str, np.ndarray], row: int) -> str:
        """Write one row into its place of the batch; return which documents it comes from."""
        number, start, stop = self._place(row)
        shard = self.store.shard(number)
        length = stop - start
        tokens = shard.tokens(start, stop + 1)  # the one behind is the last target
        document, starts = shard.documents(start, stop)
        edges = starts - start
        edges[0], edges[-1] = 0, length
        edges = np.unique(edges)  # an empty document has no segment
        sizes = np.diff(edges)
        columns["input_ids"][:length] = tokens[:length]
        columns["labels"][: len(tokens) - 1] = tokens[1:]
        # Nothing predicts across a border: the last token of a document has no target.
        columns["labels"][starts[1:][starts[1:] <= stop] - start - 1] = IGNORED
        columns["position_ids"][:length] = np.arange(length) - np.repeat(edges[:-1], sizes)
        columns["segment_ids"][:length] = np.repeat(np.arange(1, len(edges)), sizes)
        if SOURCES in columns:
            columns[SOURCES].fill(self.store.part_of_shard(number))
        first = self.store.first_documents[number] + document
        return self.store.cite(first, first + len(starts) - 1)

    def _place(self, row: int) -> tuple[int, int, int]:
        """Return the shard of a row and its tokens [start, stop) there."""
        number = bisect_right(self._first_rows, row) - 1
        start = (row - self._first_rows[number]) * self.row_tokens
        return number, start, min(start + self.row_tokens, self.store.entries[number].num_tokens)
