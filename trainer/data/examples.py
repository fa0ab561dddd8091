"""One document as a model sees it, and what makes documents of raw rows."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.nn.head import IGNORED
from trainer.data.tokenizers import Tokenizer


class Note(NamedTuple):
    """What an encoder had to do to a row that is worth counting over the data set."""

    kind: str
    """What is counted, in words: the same for all rows."""
    detail: str
    """What it was in this row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A tokenised document with what is to be learnt from it."""

    input_ids: np.ndarray
    """(n,) int64, n >= 1."""
    labels: np.ndarray | None = None
    """(n,) int64, the target of each position (a language model's are shifted already); -100: none.
    None: `classes` are the targets."""
    classes: np.ndarray | None = None
    """Of the whole document: () int64, or (num_labels,) float64; -100 or NaN: none."""
    num_bytes: int = 0
    """UTF-8 bytes of the text that is learnt, for bits per byte."""
    notes: tuple[Note, ...] = ()

    @property
    def num_targets(self) -> int:
        targets = self.labels if self.classes is None else self.classes
        assert targets is not None
        is_none = np.isnan(targets) if targets.dtype.kind == "f" else targets == IGNORED
        return int((~is_none).sum())


class BadRowError(Exception):
    """A row that no document can be made of; the message says why, in words."""


class Encoder(Protocol):
    """Makes documents of raw rows. Its settings are a frozen dataclass: part of the cache's key."""

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError where the columns of a first row cannot serve, with a suggestion."""
        ...

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document of a row; BadRowError for one that has none."""
        ...
