"""Packing of documents into rows: as tight as the naive algorithm's, in bulk."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import best_fit


def naive_spaces(lengths: list[int], row_tokens: int) -> list[int]:
    """Best fit decreasing, one document at a time: what is left of each row."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        spaces.append((min(fitting) if fitting else row_tokens) - length)
        if fitting:
            spaces.remove(min(fitting))
    return sorted(spaces)


@given(st.integers(1, 60).flatmap(
    lambda row: st.tuples(st.just(row), st.lists(st.integers(1, row), max_size=80))
))  # fmt: skip
def test_rows_are_left_as_full_as_by_the_naive_algorithm(case: tuple[int, list[int]]) -> None:
    row_tokens, lengths = case
    rows = best_fit(np.array(lengths, np.int64), row_tokens)
    used = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert sorted((row_tokens - used).astype(int).tolist()) == naive_spaces(lengths, row_tokens)


def test_half_a_million_documents_leave_next_to_no_padding() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.3, 1.2, 500_000).astype(np.int64), 1, 2048)
    rows = best_fit(lengths, 2048)
    assert np.bincount(rows, weights=lengths).max() <= 2048
    assert 1 - lengths.sum() / ((rows.max() + 1) * 2048) < 1e-3


@pytest.mark.parametrize("lengths", [[0, 3], [9, 3]])
def test_lengths_that_fit_no_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths from \d to \d do not fit rows of 8"):
        best_fit(np.array(lengths), 8)
