"""Exact match, ANLS, BLEU and ROUGE of answers: by hand, and against slow, obvious references."""

import math
from collections import Counter
from functools import cache
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.validation.scores import (
    anls,
    check_metrics,
    exact_match,
    levenshtein,
    normalised,
    scores,
)

WORDS = ("a", "red", "cat")


def test_case_and_white_space_do_not_count_and_everything_else_does() -> None:
    assert normalised("  A  Blue\n\tcat ") == "a blue cat"
    assert exact_match(" Blue\n", "blue") == 1.0
    assert exact_match("blue.", "blue") == 0.0
    assert exact_match("", " ") == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Coca Cola", "coca cola", 1.0),
        ("coco cola", "coca cola", 1 - 1 / 9),
        ("cola", "coca cola", 0.0),  # 5 of 9 letters: too far
        ("ab", "ax", 0.0),  # half of the letters is too far, too
        ("abc", "abx", 1 - 1 / 3),
        ("", "yes", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls_is_the_papers_number(answer: str, reference: str, expected: float) -> None:
    assert anls(answer, reference) == pytest.approx(expected, abs=1e-15)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_distances_are_those_of_the_recursive_definition(one: str, other: str) -> None:
    @cache
    def distance(n: int, k: int) -> int:
        if not n or not k:
            return n + k
        change = distance(n - 1, k - 1) + (one[n - 1] != other[k - 1])
        return min(distance(n - 1, k) + 1, distance(n, k - 1) + 1, change)

    assert levenshtein(one, other) == distance(len(one), len(other))


def slow_bleu(pairs: list[tuple[list[str], list[str]]]) -> float:
    """Papineni et al. 2002: the geometric mean of clipped precisions, times the brevity penalty."""
    precisions = []
    for size in range(1, 5):
        right = total = 0
        for answer, reference in pairs:
            own, other = (
                Counter(tuple(words[n : n + size]) for n in range(len(words) - size + 1))
                for words in (answer, reference)
            )
            right += sum(min(count, other[gram]) for gram, count in own.items())
            total += sum(own.values())
        precisions.append(right / total if total else 0.0)
    if not all(precisions):
        return 0.0
    answered, expected = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    penalty = min(1.0, math.exp(1 - expected / answered))
    return float(penalty * math.prod(precisions) ** 0.25)


def slow_rouge(pairs: list[tuple[list[str], list[str]]], size: int | None) -> float:
    """Lin 2004: F1 of shared n-grams, or of the longest common subsequence (None)."""

    def shared(one: list[str], other: list[str]) -> tuple[int, int, int]:
        if size is not None:
            grams = [
                Counter(tuple(words[n : n + size]) for n in range(len(words) - size + 1))
                for words in (one, other)
            ]
            return (grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()

        @cache
        def longest(n: int, k: int) -> int:
            if not n or not k:
                return 0
            if one[n - 1] == other[k - 1]:
                return longest(n - 1, k - 1) + 1
            return max(longest(n - 1, k), longest(n, k - 1))

        return longest(len(one), len(other)), len(one), len(other)

    found = [shared(*pair) for pair in pairs]
    return sum(2 * right / (n + k) if right else 0.0 for right, n, k in found) / len(found)


@pytest.mark.parametrize("seed", range(12))
def test_bleu_and_rouge_are_those_of_slow_references(seed: int) -> None:
    random = Random(seed)
    pairs = [
        (random.choices(WORDS, k=random.randint(1, 9)), random.choices(WORDS, k=7))
        for _ in range(1 + seed % 5)
    ]
    names = ("rouge_l", "bleu", "rouge_1", "rouge_2")
    answers, references = ([" ".join(pair[side]) for pair in pairs] for side in (0, 1))
    found = scores(names, answers, references)
    assert set(found) == set(names)
    assert found["bleu"] == pytest.approx(slow_bleu(pairs), abs=1e-6)
    for name, size in (("rouge_1", 1), ("rouge_2", 2), ("rouge_l", None)):
        assert found[name] == pytest.approx(slow_rouge(pairs, size), abs=1e-6)


def test_scores_are_means_over_all_pairs() -> None:
    answers, references = ["Yes", "no", "coco cola"], ["yes", "yes", "coca cola"]
    found = scores(("exact_match", "anls"), answers, references)
    assert found == {"exact_match": 1 / 3, "anls": pytest.approx((1 + 8 / 9) / 3, abs=1e-15)}


@pytest.mark.parametrize("names", [("exact",), (), ("anls", "anls")])
def test_metrics_that_are_unknown_missing_or_there_twice_are_refused(
    names: tuple[str, ...],
) -> None:
    with pytest.raises(ValueError, match=r"; take some of exact_match, anls, bleu, rouge_1"):
        check_metrics(names)
