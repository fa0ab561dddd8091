"""How near answers come to what the data says: exact match and ANLS."""

import math
from collections.abc import Callable, Sequence

from trainer.validation.ngram_scores import NGRAM_SCORES, check_installed, ngram_scores

QUESTION_ONLY = "exact_match_question_only"  # of question_only.py, beside exact_match
THRESHOLD = 0.5  # of ANLS: an answer that differs in half of its letters or more has none


def normalised(text: str) -> str:
    """Return a text in lower case, without white space around it, runs of it as one space."""
    return " ".join(text.lower().split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where both are equal but for case and white space, else 0."""
    return float(normalised(answer) == normalised(reference))


def anls(answer: str, reference: str) -> float:
    """Return the normalised Levenshtein similarity, 0 from THRESHOLD on; case does not count.

    Source: Biten et al. 2019, "Scene text visual question answering", equation 1.
    """
    answer, reference = normalised(answer), normalised(reference)
    longest = max(len(answer), len(reference))
    distance = levenshtein(answer, reference) / longest if longest else 0.0
    return 1.0 - distance if distance < THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """Return how many letters have to be put in, taken out or changed. One row of the table at a
    time."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], number
        for place, expected in enumerate(other, start=1):
            cheapest = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != expected))
            diagonal, row[place] = row[place], cheapest
    return row[-1]


OF_PAIRS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "anls": anls}
KNOWN = (*OF_PAIRS, *NGRAM_SCORES)


def check_metrics(names: Sequence[str]) -> None:
    """Raise ValueError for a metric that is unknown, or whose package is not installed."""
    for name in names:
        if name not in KNOWN:
            raise ValueError(
                f"validation.metrics has {name!r}, which is unknown; take some of "
                f"{', '.join(KNOWN)}"
            )
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"validation.metrics={list(names)} names none or one twice; take some of "
            f"{', '.join(KNOWN)}"
        )
    if any(name in NGRAM_SCORES for name in names):
        check_installed()


def scores(
    names: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Return each metric over all answers, 0 to 1: the mean over them, and BLEU of them together.

    Sums are rounded once: nothing but the pairs decides.
    """
    found = {
        name: math.fsum(map(OF_PAIRS[name], answers, references)) / len(answers)
        for name in names
        if name in OF_PAIRS
    }
    others = [name for name in names if name in NGRAM_SCORES]
    return found | (ngram_scores(others, answers, references) if others else {})
