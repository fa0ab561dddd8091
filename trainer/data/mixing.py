"""Which source a sample of the run comes from: exact shares at any place, found in O(1)."""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import lcm

import numpy as np

from trainer.data.order import permute, permute_all, round_keys


@dataclass(frozen=True)
class Mix:
    """Deals samples to sources by weight.

    Places come in blocks. How many samples of a source lie before a block's end is its share of all
    places before it, cumulatively rounded: exact to one sample at each block's end, however far the
    run has come. Within a block sources are shuffled, by a permutation keyed by the block.
    """

    weights: tuple[Fraction, ...]
    """Positive; of samples. They need not sum to 1."""
    seed: int
    first: int = 0
    """The run's sample that its place 0 is: another mix of a run is shuffled in another way."""

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the source of a place in the run, and which of that source's samples it is.

        Each source's samples 0, 1, 2, .. come up exactly once.
        """
        if len(self.weights) == 1:
            return 0, sample
        block, place = divmod(sample, self.block)
        before, starts, keys = _dealt(self, block)
        shuffled = permute(place, self.block, keys)
        source = bisect_right(starts, shuffled) - 1
        return source, before[source] + shuffled - starts[source]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` places are each source's, at a block's end."""
        total = self._cumulative[-1]
        bounds = [(2 * samples * part + total) // (2 * total) for part in self._cumulative]
        return [last - first for first, last in pairwise(bounds)]

    def rest(self, sample: int) -> list[tuple[np.ndarray, int]]:
        """Return, for each source, its samples that the running block still holds from a place on,
        ascending, and the first one behind that block. The memory is that of a block."""
        block, place = divmod(sample, self.block)
        before, starts, keys = _dealt(self, block)
        behind = self.counts((block + 1) * self.block)
        left = np.sort(permute_all(np.arange(place, self.block), self.block, keys))
        bounds = np.searchsorted(left, [*starts, self.block]).tolist()
        return [
            (left[bounds[source] : bounds[source + 1]] - start + first, end)
            for source, (start, first, end) in enumerate(zip(starts, before, behind, strict=True))
        ]

    @cached_property
    def _cumulative(self) -> list[int]:
        scale = lcm(*(weight.denominator for weight in self.weights))
        return [0, *accumulate(int(weight * scale) for weight in self.weights)]

    @cached_property
    def block(self) -> int:
        """Places in a block: so many that rounding takes no sample away from the rarest source."""
        if len(self.weights) == 1:
            return 1
        rarest = Fraction(min(self.weights)) / sum(self.weights)
        return 1 << (-(-2 // rarest) - 1).bit_length()


@lru_cache(maxsize=64)
def _dealt(mix: Mix, block: int) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Return each source's samples before a block, where it starts in it, and the block's keys."""
    before, after = mix.counts(block * mix.block), mix.counts((block + 1) * mix.block)
    quotas = [last - first for first, last in zip(before, after, strict=True)]
    starts = [0, *accumulate(quotas[:-1])]
    later = (mix.first,) if mix.first else ()
    return before, starts, round_keys("mix", mix.seed, *later, block)
