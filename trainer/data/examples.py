"""One document as a model sees it, and what makes documents of raw rows."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np

from models.nn.head import IGNORED
from trainer.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from trainer.data.images.references import ImageReference

PREFERENCE = "preference"  # the problem type of pairs, of which one text is preferred


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
    """Of the whole document: () int64, or (num_labels,) float64; -100 or NaN: none. Of a pair
    (2,) int64: the tokens of the prompt, and of the chosen text, which the rejected one follows."""
    images: "tuple[ImageReference, ...] | None" = None
    """Of its image tokens, in order; None: documents of its data have none."""
    num_bytes: int = 0
    """UTF-8 bytes of the text that is learnt or judged, for bits per byte."""
    notes: tuple[Note, ...] = ()

    @property
    def num_targets(self) -> int:
        targets = self.labels if self.classes is None else self.classes
        assert targets is not None
        return int((~is_none(targets)).sum())


def is_none(targets: np.ndarray) -> np.ndarray:
    """Return where there is no target."""
    return np.isnan(targets) if targets.dtype.kind == "f" else targets == IGNORED


class BadRowError(Exception):
    """A row that no document can be made of; the message says why, in words."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a classification head answers."""

    names: tuple[str, ...]
    """In the order of its outputs; none where the head is a language model's."""
    problem_type: str | None
    """As in Hugging Face's config.json, of whole texts, or PREFERENCE; None: every word has a
    label."""


class Encoder(Protocol):
    """Makes documents of raw rows. Its settings are a frozen dataclass: part of the cache's key."""

    @property
    def outputs(self) -> Labels | None:
        """What documents are labelled with; None: they are text to be learnt."""
        ...

    def with_labels(self, find: Callable[[str], tuple[str, ...]]) -> Self:
        """Return the encoder that knows its labels, if need be found in a column of the data."""
        ...

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError where the columns of a first row cannot serve, with a suggestion."""
        ...

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document of a row; BadRowError for one that has none."""
        ...


def described(encoder: Any) -> str:
    """Return the kind and the settings of an encoder: what decides its documents."""
    return f"{type(encoder).__name__}/{json.dumps(asdict(encoder), sort_keys=True)}"
