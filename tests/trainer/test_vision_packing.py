"""Two budgets, fair ranks, and masks of images: against slow and obvious references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.images.mask import latest_image
from trainer.data.images.packing import best_fit_images, most_images_first

EOS, IMAGE = 7, 9


def naive_rows(lengths: list[int], counts: list[int], tokens: int, images: int) -> list[int]:
    """Best fit decreasing by the fuller budget, one document at a time, with plain lists."""
    shares = [max(n / tokens, k / max(1, images)) for n, k in zip(lengths, counts, strict=True)]
    rows: list[list[int]] = []  # the space of each
    found = [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda n: (-shares[n], n)):
        fitting = [
            (space[0], space[1], row)
            for row, space in enumerate(rows)
            if space[0] >= lengths[number] and space[1] >= counts[number]
        ]
        row = min(fitting)[2] if fitting else len(rows)
        if not fitting:
            rows.append([tokens, images])
        rows[row][0] -= lengths[number]
        rows[row][1] -= counts[number]
        found[number] = row
    return found


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    tokens, images = draw(st.integers(1, 64)), draw(st.integers(0, 6))
    pairs = st.tuples(st.integers(1, tokens), st.integers(0, images))
    drawn = draw(st.lists(pairs, min_size=1, max_size=60))
    return [n for n, _ in drawn], [k for _, k in drawn], tokens, images


@given(documents())
def test_rows_are_those_of_the_naive_algorithm_and_within_both_budgets(
    case: tuple[list[int], list[int], int, int],
) -> None:
    lengths, counts, tokens, images = case
    row_of = best_fit_images(np.array(lengths), np.array(counts), tokens, images)
    assert row_of.tolist() == naive_rows(*case)
    used = np.bincount(row_of, weights=lengths), np.bincount(row_of, weights=counts)
    assert used[0].max() <= tokens
    assert used[1].max() <= images
    for one in range(len(used[0])):
        for other in range(one):  # no two rows could be one
            together = [part[one] + part[other] for part in used]
            assert together[0] > tokens or together[1] > images


@pytest.mark.parametrize(("length", "count"), [(0, 0), (9, 0), (8, 3)])
def test_documents_that_fit_no_row_are_refused(length: int, count: int) -> None:
    with pytest.raises(ValueError, match="do not fit rows of 8 tokens and 2 images"):
        best_fit_images(np.array([length]), np.array([count]), 8, 2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 4), st.integers(1, 9))
def test_ranks_get_similar_numbers_of_images(
    images_of_rows: list[int], micro_rows: int, num_ranks: int
) -> None:
    counts = np.array(images_of_rows)
    row_of = most_images_first(np.arange(len(counts)), counts)
    assert sorted(row_of.tolist()) == list(range(len(counts)))
    rows = np.zeros(len(counts), np.int64)
    rows[row_of] = counts
    batches = [int(rows[n : n + micro_rows].sum()) for n in range(0, len(rows), micro_rows)]
    batches += [0] * (-len(batches) % num_ranks)  # padding of the last round
    of_ranks = [sum(batches[rank::num_ranks]) for rank in range(num_ranks)]
    assert max(of_ranks) - min(of_ranks) <= max(batches)


def slow_latest(ids: list[int], segments: list[int], eos: int | None) -> list[int]:
    """Walk along a row with a pen: forget the image at every border, and behind every EOS."""
    found, number, latest, before = [], -1, -1, 0
    for token, segment in zip(ids, segments, strict=True):
        if segment != before:
            latest, before = -1, segment
        if token == IMAGE:
            number += 1
            latest = number
        found.append(latest if segment else -1)
        if token == eos:
            latest = -1
    return found


@settings(max_examples=300)
@given(
    st.lists(st.lists(st.sampled_from([1, 2, EOS, IMAGE]), min_size=1, max_size=9), max_size=5),
    st.integers(0, 4),
    st.sampled_from([EOS, None, 1]),
)
def test_tokens_look_at_the_latest_image_of_their_own_document(
    row: list[list[int]], padding: int, eos: int | None
) -> None:
    ids = [token for document in row for token in document] + [0] * padding
    segments = [n for n, document in enumerate(row, start=1) for _ in document] + [0] * padding
    if ids:
        found = latest_image(np.array(ids), np.array(segments), IMAGE, eos)
        assert found.tolist() == slow_latest(ids, segments, eos)


def test_a_mask_in_words() -> None:
    ids = np.array([1, IMAGE, 2, EOS, 5, 5, IMAGE, 6, IMAGE, EOS, 3, 0])
    segments = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0])
    expected = [-1, 0, 0, 0, -1, -1, 1, 1, 2, 2, -1, -1]
    assert latest_image(ids, segments, IMAGE, EOS).tolist() == expected
    in_front = np.array([IMAGE, IMAGE, IMAGE, 2])  # padding may have any id
    assert latest_image(in_front, np.array([0, 0, 1, 1]), IMAGE, EOS).tolist() == [-1, -1, 0, 0]
