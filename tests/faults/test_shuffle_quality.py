"""The shuffle is a bijection that looks like chance, for every length that is tried (A25)."""

from math import sqrt

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from tests.conftest import Figure
from trainer.data.order import permute_all, round_keys

LENGTHS, LONGEST = 200, 10**6
BINS = 16


def serial_correlation(order: np.ndarray) -> float:
    centred = order - order.mean()
    return float((centred[:-1] * centred[1:]).sum() / (centred**2).sum())


def chance_of_position(order: np.ndarray) -> float:
    """Return how likely chance is to spread places over positions less evenly (chi-square)."""
    count = len(order)
    cells = (np.arange(count) * BINS // count) * BINS + order * BINS // count
    found = np.bincount(cells, minlength=BINS * BINS).reshape(BINS, BINS)
    expected = np.outer(found.sum(1), found.sum(0)) / count
    statistic = ((found - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, (BINS - 1) ** 2))


@pytest.mark.slow
def test_two_hundred_lengths_are_shuffled_as_by_chance(figure: Figure) -> None:
    random = np.random.default_rng(25)
    worst, chances = 0.0, []
    for number, count in enumerate(random.integers(2, LONGEST + 1, LENGTHS).tolist()):
        order = permute_all(np.arange(count), count, round_keys("rows", number, 0))
        assert (np.bincount(order, minlength=count) == 1).all(), count
        if count >= 1000:  # chance alone gives 1 / sqrt(count)
            correlation = abs(serial_correlation(order))
            assert correlation < max(1e-3, 4 / sqrt(count)), count
            worst = max(worst, correlation * sqrt(count))
        if count >= 20 * BINS * BINS:  # fewer in a cell do not follow the distribution
            chances.append(chance_of_position(order))
    # Of 200 chances two lie below 0.01 by themselves: none below 0.01 / 200, and all spread evenly.
    assert len(chances) > 190
    assert min(chances) > 0.01 / LENGTHS
    evenness = float(kstest(chances, "uniform").pvalue)
    assert evenness > 0.01
    figure("A25 lengths up to 1,000,000 that are permuted one to one", LENGTHS, "")
    figure("A25 largest serial correlation, times the root of the length", worst, "")
    figure("A25 smallest p of position against source", min(chances), "")
    figure("A25 p of all of these being uniform", evenness, "")


def test_measures_see_what_is_no_shuffle() -> None:
    rows = np.arange(20_000)
    assert serial_correlation(rows) > 0.99
    assert chance_of_position(rows) < 1e-9
    by_chance = np.random.default_rng(0).permutation(20_000)
    assert abs(serial_correlation(by_chance)) < 4 / sqrt(20_000)
    assert chance_of_position(by_chance) > 0.01
