"""What fills the rows of a step with samples, as the loaders see it."""

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from trainer.batch import Batch
from trainer.data.tokens import TokenStore

Locate = Callable[[np.ndarray], list[int]]
"""Returns which row or document each global sample is."""
Dealt = Iterable[tuple[Batch, list[tuple[int, int]]]]
"""A rank's micro-batches, each with the ranges [first, last) of samples that it holds. Those with
images are made one by one: of an evaluation's block they would fill the memory."""


class Rows(Protocol):
    """Rows of a fixed length that samples fill: one each, or several documents in one."""

    store: TokenStore
    row_tokens: int
    unit: str
    """What a sample is, in the plural: `rows` or `documents`."""
    num_virtual: int
    """Tokens before each document that are no text."""

    @property
    def counts(self) -> list[int]:
        """How many samples each source has."""
        ...

    def num_tokens(self, samples: list[int]) -> int:
        """Return how many tokens of the store some of its rows or documents hold."""
        ...

    def share(self, samples: range, *, micro_rows: int, rank: int, num_ranks: int) -> list[range]:
        """Return what is known of one rank's share before anything is read."""
        ...

    def deal(
        self, samples: range, locate: Locate, *, micro_rows: int, rank: int, num_ranks: int
    ) -> Dealt:
        """Return one rank's share of some samples; every rank gets as many micro-batches."""
        ...
