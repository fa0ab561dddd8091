"""Words with tags to documents: one label for each word, on one of its tokens.

Words are joined by single spaces and tokenised as one text, which is what a model has read in
pretraining; the characters of each token say whose it is. So it works alike where the space belongs
to the next token (byte-level, SentencePiece) and where it belongs to none (WordPiece).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from models.nn.head import IGNORED
from trainer.data.examples import BadRowError, Example, Labels, Note
from trainer.data.labels import check_labels, column_of, is_missing, label_index
from trainer.data.spans import tokens_between
from trainer.data.tokenizers import Tokenizer, with_ends


@dataclass(frozen=True, kw_only=True)
class TokenEncoder:
    """The words as one text, as `tokenizer(text)` of transformers has it.

    Every word's label stands on its last token, or on its first.
    """

    tokens: str = "tokens"
    """Column of the words: a list of text."""
    tags: str = "tags"
    """Column of the tags: a list of names or integers, one for each word."""
    labels: tuple[str, ...] | None = None
    """Names, in the order of the model's outputs; None: as found in the data before encoding."""
    align: Literal["last", "first"] = "last"
    """Which token of a word has its label. A causal model has read the word at the last only."""
    allow_missing: bool = False
    """Whether a word may have no tag (null): it is no target then."""

    def __post_init__(self) -> None:
        check_labels(self.labels, 2)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's outputs; ValueError where they are not known yet."""
        if self.labels is None:
            raise ValueError(
                "data.encoder.labels is not known yet; set it to the names of the labels"
            )
        return self.labels

    @property
    def outputs(self) -> Labels:
        return Labels(names=self.names, problem_type=None)

    def with_labels(self, find: Callable[[str], tuple[str, ...]]) -> Self:
        return self if self.labels is not None else replace(self, labels=find(self.tags))

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError where a column is missing or holds no list."""
        for setting, column in (("tokens", self.tokens), ("tags", self.tags)):
            value = column_of(row, column, setting, where)
            if not isinstance(value, list):
                raise ValueError(
                    f"{where}: column {column!r} holds {type(value).__name__}, needed a list; set "
                    f"data.encoder.{setting} to a column of lists"
                )

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document with a label for each word."""
        words, classes = self._words(row)
        text = " ".join(words)
        ids, places = tokenizer.encode_with_spans(text)
        labels = np.full(len(ids), IGNORED, np.int64)
        last, notes = -1, []
        for word, class_, tokens in zip(words, classes, word_tokens(words, places), strict=True):
            if tokens is None:
                notes.append(Note("words without a token", repr(word)))
                continue
            token = tokens[0] if self.align == "first" else tokens[1]
            if token == last:
                notes.append(Note("words that share their token with another", repr(word)))
            labels[token], last = class_, token
        if not (labels != IGNORED).any():
            raise BadRowError("no word of the row has a label and a token; drop the row")
        return Example(
            input_ids=with_ends(ids, tokenizer),
            labels=np.pad(labels, list(map(len, tokenizer.ends)), constant_values=IGNORED),
            num_bytes=len(text.encode()),
            notes=tuple(notes),
        )

    def _words(self, row: dict[str, Any]) -> tuple[list[str], list[int]]:
        words, tags = row.get(self.tokens), row.get(self.tags)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadRowError(f"column {self.tokens} holds no list of words; correct the row")
        if not isinstance(tags, list) or len(tags) != len(words):
            found = len(tags) if isinstance(tags, list) else "no"
            raise BadRowError(f"the row has {len(words)} words and {found} tags; correct the row")
        if any(map(is_missing, tags)) and not self.allow_missing:
            raise BadRowError(
                f"column {self.tags} has a null; give every word a tag, or set "
                "data.encoder.allow_missing"
            )
        return words, [IGNORED if is_missing(tag) else label_index(tag, self.names) for tag in tags]


def word_tokens(words: list[str], places: np.ndarray) -> list[tuple[int, int] | None]:
    """Return the first and the last token of each word that is joined by spaces; None for none."""
    found: list[tuple[int, int] | None] = []
    start = 0
    for word in words:
        first, last = tokens_between(places, start, start + len(word))
        found.append((first, last) if first <= last and word else None)
        start += len(word) + 1
    return found
