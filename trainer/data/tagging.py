"""Words with tags to documents: one label for each word, on one of its tokens.

Words are joined by single spaces and tokenised as one text, which is what a model has read in
pretraining; the characters of each token say whose it is. So it works alike where the space belongs
to the next token (byte-level, SentencePiece) and where it belongs to none (WordPiece).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from models.nn.head import IGNORED
from trainer.data.examples import BadRowError, Example, Note
from trainer.data.labels import check_labels, column_of, label_index
from trainer.data.spans import tokens_between
from trainer.data.tokenizers import Tokenizer, surround


@dataclass(frozen=True, kw_only=True)
class TokenEncoder:
    """BOS, the words, EOS; every word's label stands on its last token, or on its first."""

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
            raise ValueError("data.labels is not known yet; set it to the names of the labels")
        return self.labels

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError where a column is missing or holds no list."""
        for setting, column in (("tokens", self.tokens), ("tags", self.tags)):
            value = column_of(row, column, setting, where)
            if not isinstance(value, list):
                raise ValueError(
                    f"{where}: column {column!r} holds {type(value).__name__}, needed a list; set "
                    f"data.{setting} to a column of lists"
                )

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document with a label for each word."""
        words, classes = self._words(row)
        ids, places = tokenizer.encode_with_spans(" ".join(words))
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
            input_ids=surround(ids, tokenizer),
            labels=_between_borders(labels, tokenizer),
            notes=tuple(notes),
        )

    def _words(self, row: dict[str, Any]) -> tuple[list[str], list[int]]:
        words, tags = row.get(self.tokens), row.get(self.tags)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadRowError(f"column {self.tokens} holds no list of words; correct the row")
        if not isinstance(tags, list) or len(tags) != len(words):
            found = len(tags) if isinstance(tags, list) else "no"
            raise BadRowError(f"the row has {len(words)} words and {found} tags; correct the row")
        if None in tags and not self.allow_missing:
            raise BadRowError(
                f"column {self.tags} has a null; give every word a tag, or set data.allow_missing"
            )
        return words, [IGNORED if tag is None else label_index(tag, self.names) for tag in tags]


def word_tokens(words: list[str], places: np.ndarray) -> list[tuple[int, int] | None]:
    """Return the first and the last token of each word that is joined by spaces; None for none."""
    found: list[tuple[int, int] | None] = []
    start = 0
    for word in words:
        first, last = tokens_between(places, start, start + len(word))
        found.append((first, last) if first <= last and word else None)
        start += len(word) + 1
    return found


def _between_borders(labels: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the labels of a whole document: BOS and EOS have none."""
    before = int(tokenizer.bos_token_id is not None)
    behind = int(tokenizer.eos_token_id is not None)
    return np.pad(labels, (before, behind), constant_values=IGNORED)
