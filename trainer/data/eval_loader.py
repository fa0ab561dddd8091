"""Which held-out rows an evaluation reads: all of them, or the same fair sample each time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from trainer.batch import Batch
from trainer.data.row_filling import Rows

EVAL_BLOCK = 512  # samples that are dealt together in an evaluation
FEWEST = {"rows": 64, "documents": 256}
"""However small the share: a row has a target for each token, a document may have but one."""
STEP_COST = 3  # forward passes: backward takes two, where all weights train


def most_samples(share: float, eval_every: int, global_samples: int, unit: str) -> int:
    """Return how many rows or documents cost `share` of the time of the `eval_every` steps of
    `global_samples` each between two evaluations, but no fewer than are needed for a number."""
    return max(FEWEST[unit], int(share * STEP_COST * eval_every * global_samples))


@dataclass(frozen=True, kw_only=True)
class EvalLoader:
    """Yields samples of a store exactly once over all ranks, equally many batches on each.

    They are all of its rows or documents, or `most` of them: the same ones each time and on every
    layout, of each source as many as its size asks for (one at least), evenly spaced over it.
    """

    rows: Rows
    micro_rows: int
    rank: int
    num_ranks: int
    most: int | None = None
    """How many rows or documents are read, unless that every source has one; None: all."""

    @cached_property
    def sizes(self) -> list[int]:
        """How many samples of each source are read."""
        counts, total = self.rows.counts, self.num_held_out
        if self.most is None or self.most >= total:
            return counts
        return [min(count, max(1, self.most * count // total)) for count in counts]

    @property
    def num_read(self) -> int:
        return sum(self.sizes)

    @property
    def num_held_out(self) -> int:
        return sum(self.rows.counts)

    @property
    def is_sample(self) -> bool:
        return self.num_read < self.num_held_out

    @cached_property
    def num_bytes(self) -> float:
        """UTF-8 bytes of the text that is read, in proportion to its tokens; 0: unknown."""
        store = self.rows.store
        if not self.is_sample:
            return store.num_bytes
        read = [n for source in range(len(self.sizes)) for n in self._chosen(source)]
        return store.num_bytes * self.rows.num_tokens(read) / store.num_tokens

    @property
    def extent(self) -> dict[str, int]:
        """What an evaluation says of a sample; nothing where all is read."""
        if not self.is_sample:
            return {}
        name = f"num_{self.rows.unit}"
        return {name: self.num_read, f"{name}_held_out": self.num_held_out}

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield each batch with the number of the source that it is from."""
        block = max(EVAL_BLOCK, self.num_ranks * self.micro_rows)
        for source, size in enumerate(self.sizes):
            for start in range(0, size, block):
                dealt = self.rows.deal(
                    range(start, min(start + block, size)), partial(self._located, source),
                    micro_rows=self.micro_rows, rank=self.rank, num_ranks=self.num_ranks,
                )  # fmt: skip
                yield from ((source, batch) for batch, _ in dealt)

    def _located(self, source: int, places: np.ndarray) -> list[int]:
        """Return which rows or documents of the store a source's samples number `places` are."""
        first, count = sum(self.rows.counts[:source]), self.rows.counts[source]
        twice = 2 * self.sizes[source]
        # The middle of each of so many equal stretches; of Python's integers: none is too long.
        return [first + (2 * place + 1) * count // twice for place in places.tolist()]

    def _chosen(self, source: int) -> list[int]:
        return self._located(source, np.arange(self.sizes[source]))
