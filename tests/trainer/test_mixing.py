"""Mixing: exact shares everywhere, every sample of every source once, no table."""

from collections import Counter
from fractions import Fraction

import pytest

from trainer.data.mixing import Mix

WEIGHTS = [
    (Fraction(1),),
    (Fraction(7, 10), Fraction(3, 10)),
    (Fraction(1), Fraction(1), Fraction(1)),
    (Fraction(3), Fraction(5, 7), Fraction(1, 900)),
    tuple(Fraction(n * n + 1, 13) for n in range(40)),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("block", [0, 1, 10**9])
def test_every_sample_comes_up_once_and_shares_are_exact_to_one(
    weights: tuple[Fraction, ...], block: int
) -> None:
    mix = Mix(weights, seed=3)
    first, last = block * mix.block, (block + 1) * mix.block
    found = [mix.locate(sample) for sample in range(first, last)]
    before, after = mix.counts(first), mix.counts(last)
    expected = {(k, j) for k in range(len(weights)) for j in range(before[k], after[k])}
    assert len(found) == len(set(found))
    assert set(found) == expected or len(weights) == 1
    total = sum(weights)
    for k, weight in enumerate(weights):
        assert abs(after[k] - last * weight / total) <= 1


@pytest.mark.parametrize("weights", WEIGHTS[1:])
def test_no_block_takes_a_sample_back(weights: tuple[Fraction, ...]) -> None:
    mix = Mix(weights, seed=0)
    last = [0] * len(weights)
    for block in range(1, 500):
        counts = mix.counts(block * mix.block)
        assert sum(counts) == block * mix.block
        assert all(new >= old for new, old in zip(counts, last, strict=True))
        last = counts


def test_seed_and_block_change_the_shuffle() -> None:
    weights = (Fraction(1), Fraction(1))
    orders = [
        [Mix(weights, seed).locate(start + place)[0] for place in range(8)]
        for seed in range(4)
        for start in (0, 8, 16)
    ]
    assert len({tuple(order) for order in orders}) > 6
    assert all(Counter(order) == {0: 4, 1: 4} for order in orders)


def test_the_mix_never_changes_between_versions() -> None:
    mix = Mix((Fraction(2), Fraction(1)), seed=7)
    assert [mix.locate(sample) for sample in range(6)] == EXPECTED


EXPECTED = [(0, 2), (1, 0), (1, 2), (0, 4), (0, 3), (1, 1)]
