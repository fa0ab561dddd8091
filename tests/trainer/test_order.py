"""The O(1) shuffle: a bijection for every length, pseudo-random, and the same everywhere."""

from itertools import pairwise

import numpy as np
import pytest

from trainer.data.order import permute, permute_all, round_keys


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 4099])
def test_every_index_is_hit_exactly_once(count: int) -> None:
    for seed in range(3):
        keys = round_keys("rows", seed, 0)
        assert sorted(permute(i, count, keys) for i in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 5, 17, 1000, 4099, 2 * 10**12, 2**62 + 1])
def test_all_at_once_are_permuted_as_one_by_one(count: int) -> None:
    keys = round_keys("rows", 3, 1)
    indices = np.unique(np.linspace(0, count - 1, 200).astype(np.int64).clip(0, count - 1))
    expected = [permute(int(index), count, keys) for index in indices]
    assert permute_all(indices, count, keys).tolist() == expected


def test_seed_and_epoch_change_the_order() -> None:
    orders = {
        tuple(permute(i, 100, round_keys("rows", seed, epoch)) for i in range(100))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_neighbours_are_not_correlated() -> None:
    count = 4096
    order = [permute(i, count, round_keys("rows", 1, 0)) for i in range(count)]
    mean = (count - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in pairwise(order))
    variance = sum((a - mean) ** 2 for a in order)
    assert abs(covariance / variance) < 4 / count**0.5  # four times what chance gives


def test_places_of_a_huge_corpus_need_no_table() -> None:
    count = 2 * 10**12
    places = {permute(i, count, round_keys("rows", 1, 0)) for i in range(100)}
    assert len(places) == 100
    assert all(0 <= place < count for place in places)


def test_the_order_never_changes_between_versions() -> None:
    # Resumed runs depend on these numbers: raise loader.VERSION when they must change.
    found = [permute(i, 1000, round_keys("rows", 0, 0)) for i in range(5)]
    assert found == [126, 668, 157, 863, 244]
