"""What held-out documents ask, and the answers that they give themselves."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from models.nn.head import IGNORED
from trainer.data.documents import PackedDocuments
from trainer.data.order import permute_all, round_keys

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Tokens before an answer, and the answer."""

    document: int
    """Number of its document in the store."""
    prompt: list[int]
    """All tokens before the answer, virtual ones too; of a conversation all earlier turns."""
    reference: list[int]
    """The answer as the data has it, with the token that ends it."""


def questions_of(
    rows: PackedDocuments, *, max_documents: int | None, room: int
) -> tuple[Question, ...]:
    """Return the questions of some documents, drawn from all of them: always the same ones.

    A prompt has at most `room` tokens: longer ones are counted and left out. ValueError where
    nothing is asked.
    """
    count = sum(rows.counts)
    found = [q for number in drawn(count, max_documents) for q in _asked(rows, number)]
    kept = tuple(question for question in found if len(question.prompt) <= room)
    num_longer = len(found) - len(kept)
    if num_longer:
        log.warning(
            "validation: %d of %d questions have more than %d tokens, which leave no room for "
            "validation.max_new_tokens: they are not asked", num_longer, len(found), room,
        )  # fmt: skip
    if not kept:
        found_words = f"{len(found)} questions, all too long" if found else "no question"
        raise ValueError(
            f"validation found {found_words}, in {count} held-out documents; give rows with "
            "prompts, conversations or captions of images, or set validation.every=null"
        )
    return kept


def drawn(count: int, wanted: int | None) -> list[int]:
    """Return `wanted` of the numbers 0 to count - 1, in order; None, or more than there are: all.

    Nothing but `count` decides which; a larger draw holds a smaller one. Equal distances would meet
    rows of one kind alone where kinds take turns.
    """
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(permute_all(np.arange(wanted), count, round_keys("validation")).tolist())


def _asked(rows: PackedDocuments, number: int) -> Iterator[Question]:
    """Yield a question for each run of tokens that is learnt behind others that are not."""
    example = rows.example(number)
    assert example.labels is not None
    ids, is_learnt = example.input_ids, example.labels != IGNORED
    borders = np.flatnonzero(np.diff(is_learnt, prepend=False, append=False))
    for start, stop in pairwise(borders.tolist()):
        # A text from its beginning on answers nothing: before it stands BOS at most.
        if is_learnt[start] and start > rows.num_virtual:
            yield Question(
                document=number,
                prompt=ids[: start + 1].tolist(),
                reference=example.labels[start:stop].tolist(),
            )
