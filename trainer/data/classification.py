"""Texts with labels to documents: one text or two, and what the whole of it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from models.nn.head import IGNORED
from trainer.data.examples import BadRowError, Example, Labels
from trainer.data.labels import check_labels, column_of, is_missing, label_index
from trainer.data.tokenizers import Tokenizer, with_ends


@dataclass(frozen=True, kw_only=True)
class SequenceEncoder:
    """The text as `tokenizer(text)` of transformers has it, and its class or numbers."""

    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of a second text behind it; None: there is one text."""
    separator: str | None = None
    """What stands between two texts; None: the tokenizer's sep_token, or a new line without one."""
    label: str = "label"
    """Column of the label: a name or an integer; for several, a list of names or a vector of 0 and
    1; for regression a number, or a list of them."""
    labels: tuple[str, ...] | None = None
    """Names, in the order of the model's outputs; None: as found in the data before encoding, and
    for regression one output."""
    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = "single_label_classification"
    """Exactly one label, any number of them, or numbers."""
    allow_missing: bool = False
    """Whether a row may have no label (null): it is no target then."""

    def __post_init__(self) -> None:
        check_labels(self.labels, 2 if self.problem_type == "single_label_classification" else 1)
        if self.separator is not None and self.text_pair is None:
            raise ValueError(
                f"separator={self.separator!r} has no effect without text_pair; leave it out"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's outputs; ValueError where they are not known yet."""
        if self.labels is not None:
            return self.labels
        if self.problem_type == "regression":
            return (self.label,)
        raise ValueError("data.encoder.labels is not known yet; set it to the names of the labels")

    @property
    def outputs(self) -> Labels:
        return Labels(names=self.names, problem_type=self.problem_type)

    def with_labels(self, find: Callable[[str], tuple[str, ...]]) -> Self:
        """Return the encoder with its labels; ValueError for vectors, which name none."""
        if self.labels is not None or self.problem_type == "regression":
            return self
        found = find(self.label)
        if self.problem_type == "multi_label_classification" and set(found) <= {"0", "1"}:
            raise ValueError(
                f"column {self.label!r} holds vectors of 0 and 1, which name no label; set "
                "data.encoder.labels to their names, in the order of the vector"
            )
        return replace(self, labels=found)

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError where a column is missing or the first row is not of this problem."""
        column_of(row, self.text, "text", where)
        if self.text_pair is not None:
            column_of(row, self.text_pair, "text_pair", where)
        value = column_of(row, self.label, "label", where)
        is_single = self.problem_type == "single_label_classification"
        if is_single and isinstance(value, list):
            raise ValueError(
                f"{where}: column {self.label!r} holds lists; set "
                "data.encoder.problem_type=multi_label_classification"
            )

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document with its classes."""
        text = _text(row, self.text)
        if self.text_pair is not None:
            separator = self.separator or tokenizer.special_tokens.get("sep_token", "\n")
            # One text, so that a separator that is a special token becomes its id.
            text = f"{text}{separator}{_text(row, self.text_pair)}"
        return Example(
            input_ids=with_ends(tokenizer.encode(text), tokenizer),
            classes=self._classes(row.get(self.label)),
            num_bytes=len(text.encode()),
        )

    def _classes(self, value: Any) -> np.ndarray:
        if is_missing(value):
            value = None
        if value is None and not self.allow_missing:
            raise BadRowError(
                f"column {self.label} is null; give a label, or set data.encoder.allow_missing"
            )
        if self.problem_type != "single_label_classification":
            return self._numbers(value)
        if isinstance(value, list):
            raise BadRowError(f"column {self.label} holds {len(value)} labels, needed one")
        return np.array(IGNORED if value is None else label_index(value, self.names), np.int64)

    def _numbers(self, value: Any) -> np.ndarray:
        if value is None:
            return np.full(len(self.names), np.nan)
        values = value if isinstance(value, list | tuple) else [value]
        is_multi_label = self.problem_type == "multi_label_classification"
        if is_multi_label and all(isinstance(item, str) for item in values):
            classes = np.zeros(len(self.names))
            classes[[label_index(item, self.names) for item in values]] = 1.0
            return classes
        return self._vector(values, {0, 1} if is_multi_label else None)

    def _vector(self, values: Any, allowed: set[int] | None) -> np.ndarray:
        """Return numbers, one per output; null where none is known, if that is allowed."""
        for item in values:
            if is_missing(item) and self.allow_missing:
                continue
            if not isinstance(item, int | float) or not math.isfinite(item):
                raise BadRowError(
                    f"column {self.label} holds {item!r}, needed a number; correct the row, or "
                    "set another data.encoder.problem_type"
                )
            if allowed is not None and item not in allowed:
                raise BadRowError(f"column {self.label} holds {item!r}, needed 0, 1 or names")
        if len(values) != len(self.names):
            raise BadRowError(
                f"column {self.label} has {len(values)} numbers, needed {len(self.names)}: one "
                f"for each of {', '.join(self.names)}"
            )
        return np.array([np.nan if item is None else item for item in values], np.float64)


def _text(row: dict[str, Any], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text:
        found = "no text" if text == "" else type(text).__name__
        raise BadRowError(f"column {column} holds {found}, needed text; correct or drop the row")
    return text
