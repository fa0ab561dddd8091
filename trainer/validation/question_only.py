"""What a question gives away by itself: its most frequent answer in training, without a look."""

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from functools import cache
from typing import TypeVar

import numpy as np

from models.nn.head import IGNORED
from trainer.data.document_store import DocumentStore
from trainer.data.images.tokens import TOKENS
from trainer.data.tokenizers import Tokenizer
from trainer.validation.questions import Question
from trainer.validation.scores import exact_match, normalised

log = logging.getLogger(__name__)
MAX_DOCUMENTS = 1 << 20  # of training: more are not read
MAX_ANSWERS = 1 << 16  # different ones: answers in free words say nothing, and fill memory
Q = TypeVar("Q", bound=Hashable)


class _TooManyAnswersError(Exception):
    """Answers in free words."""


def most_frequent(pairs: Iterable[tuple[Q, str]]) -> tuple[dict[Q, str], str]:
    """Return each question's most frequent answer, and that of all; of equals the first met.

    Answers are compared as by `exact_match`, and returned so. No pair at all: "" is that of all.
    """
    of_each: dict[Q, Counter[str]] = defaultdict(Counter)
    of_all: Counter[str] = Counter()
    spelled = cache(normalised)
    for question, answer in pairs:
        of_each[question][spelled(answer)] += 1
        of_all[spelled(answer)] += 1
    best = {question: counts.most_common(1)[0][0] for question, counts in of_each.items()}
    return best, of_all.most_common(1)[0][0] if of_all else ""


def question_only(
    training: DocumentStore,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    num_virtual: int,
) -> float | None:
    """Return the exact match of answers that no image, and no model, is asked for.

    Each is the most frequent one of the training documents with exactly this text before their
    answer, images left out; for a text that none of them has, the most frequent one of all. The
    same on every rank: all read the whole of `training`. None where that says nothing: documents
    that ask several questions, or have no text before the answer, or no such document to learn of.
    """
    left_out = [ids[0] for ids in map(tokenizer.encode, TOKENS) if len(ids) == 1]
    asked = [_text(question.prompt[num_virtual:], left_out) for question in questions]
    numbers = {question.document for question in questions}
    blank = {*left_out, *tokenizer.special_ids}
    is_asked = any(not blank.issuperset(question.prompt[num_virtual:]) for question in questions)
    if len(numbers) < len(questions) or not is_asked:
        return None
    if training.num_documents > MAX_DOCUMENTS:
        _say(f"{training.num_documents} training documents", MAX_DOCUMENTS)
        return None
    try:
        best, usual = most_frequent(_learnt(training, left_out, set(asked), tokenizer))
    except _TooManyAnswersError:
        _say("different answers in training", MAX_ANSWERS)
        return None
    if not usual:
        return None
    references = [tokenizer.decode(question.reference) for question in questions]
    guesses = (best.get(text, usual) for text in asked)
    return sum(map(exact_match, guesses, references)) / len(references)


def _say(what: str, limit: int) -> None:
    log.info(
        "validation: what questions alone give away is not counted: %s are more than %d",
        what, limit,
    )  # fmt: skip


def _text(ids: list[int], left_out: Collection[int]) -> bytes:
    return np.array([token for token in ids if token not in left_out], np.int64).tobytes()


def _learnt(
    training: DocumentStore,
    left_out: list[int],
    asked: set[bytes],
    tokenizer: Tokenizer,
) -> Iterator[tuple[bytes | None, str]]:
    """Yield text and answer of each document that has one; None: a text that nobody asks.

    Raises _TooManyAnswersError at more than MAX_ANSWERS different ones.
    """
    decoded: dict[bytes, str] = {}
    for starts, ids, labels in training.blocks():
        for text, answer in _pairs(starts, ids, labels, left_out):
            if answer not in decoded:
                decoded[answer] = tokenizer.decode(np.frombuffer(answer, np.int64).tolist())
                if len(decoded) > MAX_ANSWERS:
                    raise _TooManyAnswersError
            yield (text if text in asked else None), decoded[answer]


def _pairs(
    starts: np.ndarray, ids: np.ndarray, labels: np.ndarray, left_out: list[int]
) -> Iterator[tuple[bytes, bytes]]:
    """Yield the ids before and of the answer of documents that have one run of trained tokens.

    The same borders as those of the questions: the token that predicts the first one is text.
    """
    is_learnt = np.append(labels != IGNORED, False)
    is_new = np.zeros(len(ids), bool)
    is_new[starts[:-1][np.diff(starts) > 0]] = True
    begins = is_learnt[:-1] & (is_new | ~np.roll(is_learnt, 1)[:-1])
    ends = is_learnt[:-1] & (np.append(is_new[1:], True) | ~is_learnt[1:])
    firsts, lasts = np.flatnonzero(begins), np.flatnonzero(ends)
    runs = np.searchsorted(firsts, starts)  # before each document
    is_text = ~np.isin(ids, left_out)
    texts, places = ids[is_text], np.concatenate(([0], np.cumsum(is_text)))
    (own,) = np.nonzero(np.diff(runs) == 1)
    for document, run in zip(own.tolist(), runs[own].tolist(), strict=True):
        start, first, last = starts[document], firsts[run], lasts[run]
        if first > start:  # a text from its beginning on answers nothing
            before = texts[places[start] : places[first + 1]]
            yield before.tobytes(), labels[first : last + 1].tobytes()
