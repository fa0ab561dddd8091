"""The slow way through changing mixtures: each source is a list, of which blocks take the front."""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import floor

from trainer.data.order import permute, round_keys

MANY = 1500  # samples of a source that are listed


@dataclass(frozen=True)
class Stretch:
    """Shares that a run has for so many samples."""

    weights: dict[str, int]
    samples: int


def slow_order(stretches: list[Stretch], seed: int) -> list[tuple[str, int]]:
    """Return the source of each sample of a run, and which of that source's samples it is."""
    waiting: dict[str, list[int]] = {}
    found: list[tuple[str, int]] = []
    for stretch in stretches:
        for name in stretch.weights:
            waiting.setdefault(name, list(range(MANY)))
        found += _of(stretch, waiting, seed, len(found))
    return found


def _of(
    stretch: Stretch, waiting: dict[str, list[int]], seed: int, first: int
) -> list[tuple[str, int]]:
    """Deal block after block from the front of the lists; put back what the last one left over."""
    names, found = list(stretch.weights), []
    for number in range(stretch.samples // block_of(stretch.weights) + 1):
        taken = block(stretch.weights, number)
        cards = [(name, waiting[name].pop(0)) for name in names for _ in range(taken[name])]
        if len(names) > 1:
            later = (first,) if first else ()
            keys = round_keys("mix", seed, *later, number)
            cards = [cards[permute(place, len(cards), keys)] for place in range(len(cards))]
        room = stretch.samples - len(found)
        found += cards[:room]
        for name in names:
            back = sorted(k for other, k in cards[room:] if other == name)
            waiting[name][:0] = back
    return found


def block_of(weights: dict[str, int]) -> int:
    """Return the least power of two with two samples of the rarest source on average."""
    if len(weights) == 1:
        return 1
    size = 1
    while size * Fraction(min(weights.values()), sum(weights.values())) < 2:
        size *= 2
    return size


def block(weights: dict[str, int], number: int) -> dict[str, int]:
    """Return how many samples of each source a block has: rounded shares, cumulatively."""
    size, total = block_of(weights), sum(weights.values())
    before, after = (
        [floor(Fraction(n * size * part, total) + Fraction(1, 2)) for part in sums(weights)]
        for n in (number, number + 1)
    )
    ends = [b - a for a, b in zip(before, after, strict=True)]
    return {name: ends[i + 1] - ends[i] for i, name in enumerate(weights)}


def sums(weights: dict[str, int]) -> list[int]:
    return [0, *accumulate(weights.values())]


def era_of(stretches: list[Stretch], sample: int) -> int:
    """Return which of the stretches a sample is in."""
    ends = list(accumulate(stretch.samples for stretch in stretches))
    return bisect_right(ends, sample)
