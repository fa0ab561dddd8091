"""Metrics of classifiers against their formulas, spelled out; entities against a slow reading."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.callbacks.confusion import pair_lines, table_lines
from trainer.tasks import metrics
from trainer.tasks.entities import entities, is_tagging

NAMES = ("a", "b", "c")
RANDOM = np.random.default_rng(0)


def f1(right: int, guessed: int, true: int) -> float:
    return 2 * right / (guessed + true) if guessed + true else 0.0


def test_scores_of_classes_follow_their_formulas() -> None:
    truth = RANDOM.integers(0, 3, 200)
    logits = RANDOM.normal(size=(200, 3)) + np.eye(3)[truth]
    found = metrics.single_label(truth, logits, NAMES)
    guess = logits.argmax(1)
    counts = Counter(zip(truth.tolist(), guess.tolist(), strict=True))
    assert found["confusion"] == {
        "labels": list(NAMES),
        "rows_are_truth": [[counts[i, j] for j in range(3)] for i in range(3)],
    }
    assert found["accuracy"] == found["micro_f1"] == pytest.approx((truth == guess).mean())
    each = [f1(counts[k, k], (guess == k).sum(), (truth == k).sum()) for k in range(3)]
    assert found["macro_f1"] == pytest.approx(sum(each) / 3)
    # Gorodkin 2004: MCC of K classes as a correlation of indicator matrices.
    x, y = np.eye(3)[truth], np.eye(3)[guess]
    cov = [((u - u.mean(0)) * (v - v.mean(0))).sum() for u, v in ((x, y), (x, x), (y, y))]
    assert found["mcc"] == pytest.approx(cov[0] / math.sqrt(cov[1] * cov[2]))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    top, expected = p.max(1), 0.0
    for low, high in pairwise(np.linspace(0, 1, metrics.BINS + 1)):
        is_in = (top > low) & (top <= high)
        if is_in.any():
            gap = abs((truth == guess)[is_in].mean() - top[is_in].mean())
            expected += is_in.mean() * gap
    assert found["calibration_error"] == pytest.approx(expected)


def test_a_label_that_nobody_guessed_has_an_f1_of_zero() -> None:
    found = metrics.single_label(np.array([0, 1, 2]), np.array([[1.0, 0, 0]] * 3), NAMES)
    assert found["macro_f1"] == pytest.approx(f1(1, 3, 1) / 3)
    assert found["mcc"] == 0.0


def test_of_several_labels_unknown_ones_do_not_count() -> None:
    truth = np.array([[1.0, 0, np.nan], [0, 1, 1], [1, 1, 0], [np.nan, 0, 0]])
    logits = np.array([[1.0, 2, 3], [-1, 1, -1], [1, -1, -2], [5, -1, -1]])
    found = metrics.multi_label(truth, logits)
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["exact_match"] == pytest.approx(1 / 4)
    assert found["micro_f1"] == pytest.approx(f1(3, 4, 5))
    assert found["macro_f1"] == pytest.approx((f1(2, 2, 2) + f1(1, 2, 2) + f1(0, 0, 1)) / 3)


def test_numbers_have_errors_and_correlations() -> None:
    truth = np.array([[1.0, 5], [2, np.nan], [3, 7], [4, 9]])
    guess = np.array([[1.5, 5], [1.0, 100], [3, 6], [9, 20]])
    found = metrics.regression(truth, guess)
    errors = [0.5, 0, 1, 0, 1, 5, 11]
    assert found["mean_absolute_error"] == pytest.approx(sum(errors) / 7)
    assert found["root_mean_square_error"] == pytest.approx(
        math.sqrt(sum(e * e for e in errors) / 7)
    )
    known = [([1, 2, 3, 4], [1.5, 1, 3, 9]), ([5, 7, 9], [5, 6, 20])]
    assert found["pearson"] == pytest.approx(np.mean([np.corrcoef(*pair)[0, 1] for pair in known]))
    ranks = [([1, 2, 3, 4], [2, 1, 3, 4]), ([1, 2, 3], [1, 2, 3])]
    assert found["spearman"] == pytest.approx(np.mean([np.corrcoef(*pair)[0, 1] for pair in ranks]))
    constant = metrics.regression(np.ones((3, 1)), np.ones((3, 1)))
    assert math.isnan(constant["pearson"])


def slow_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Read tags word by word, by the two rules of conlleval for where an entity begins and ends."""
    found = set()
    for start in range(len(tags)):
        before, tag = tags[start - 1] if start else "O", tags[start]
        begins = tag != "O" and (tag[0] == "B" or before == "O" or before[2:] != tag[2:])
        if begins:
            stop = start + 1
            while stop < len(tags) and tags[stop] == "I-" + tag[2:]:
                stop += 1
            found.add((tag[2:], start, stop))
    return found


TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y")


@settings(max_examples=300, derandomize=True)
@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_those_of_a_slow_reading(tags: list[str]) -> None:
    found = list(entities(tags))
    assert set(found) == slow_entities(tags)
    assert len(found) == len(set(found))


def test_an_entity_counts_when_type_and_words_are_right_and_ends_with_its_document() -> None:
    index = {tag: number for number, tag in enumerate(TAGS)}
    truth = ["B-X", "I-X", "O", "B-Y", "I-X"]
    guess = ["B-X", "I-X", "O", "B-Y", "B-X"]
    documents = np.array([1, 1, 1, 1, 2])
    both = [np.array([index[tag] for tag in tags]) for tags in (truth, guess)]
    scores = metrics.of_words(documents, *both, np.full(5, 0.9), TAGS)
    assert scores["entity_f1"] == 1.0  # one document later, I-X begins an entity as B-X does
    joined = metrics.of_words(np.ones(5), *both, np.full(5, 0.9), TAGS)
    assert joined["entity_f1"] == 1.0
    both[1][1] = index["O"]
    half = metrics.of_words(documents, *both, np.full(5, 0.9), TAGS)
    assert half["entity_precision"] == half["entity_recall"] == pytest.approx(2 / 3)
    assert not is_tagging(("NN", "VB", "O"))
    assert "entity_f1" not in metrics.of_words(
        documents, *both, np.full(5, 0.9), ("NN", "VB", "JJ", "DT", "X")
    )


def test_the_table_fits_a_terminal_and_names_what_is_confused() -> None:
    lines = table_lines(["ham", "a long name"], [[3, 1], [0, 0]])
    assert [line.split() for line in lines[2:]] == [
        ["truth", "ham", "a", "long", "recall"],
        ["ham", "3", "1", "75.0%"],
        ["a", "long", "name", "0", "0", "-"],
    ]
    pairs = pair_lines(list("abc"), [[5, 2, 0], [7, 1, 0], [0, 1, 0]], 2)
    assert pairs[2:] == ["       7 x b taken for a", "       2 x a taken for b"]
