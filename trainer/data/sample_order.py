"""Which row or document stands at each place of the run: shuffled, and mixed from sources."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

import numpy as np

from trainer.data.mixing import Mix
from trainer.data.order import permute_all, round_keys


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """A pure function of the place, in memory that does not grow with the data.

    A place belongs to a source, of which it is the k-th sample: permute(k mod its count, key(seed,
    source, k div its count)). So each source is gone through again and again, in another order
    each time, however often the others were.
    """

    counts: tuple[int, ...]
    """Rows or documents of each source; they are numbered through all sources."""
    weights: tuple[Fraction, ...]
    """Shares of the samples."""
    seed: int

    @cached_property
    def _mix(self) -> Mix:
        return Mix(self.weights, self.seed)

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def locate(self, samples: np.ndarray) -> list[int]:
        """Return the row or document of each place of the run."""
        sources = np.zeros(len(samples), np.int64)
        numbers = samples
        if len(self.counts) > 1:
            pairs = np.array([self._mix.locate(sample) for sample in samples.tolist()], np.int64)
            sources, numbers = pairs.reshape(-1, 2).T
        epochs, indices = np.divmod(numbers, np.array(self.counts)[sources])
        found = np.empty_like(numbers)
        for source, epoch in set(zip(sources.tolist(), epochs.tolist(), strict=True)):
            is_here = (sources == source) & (epochs == epoch)
            own = permute_all(indices[is_here], self.counts[source], self._keys(source, epoch))
            found[is_here] = own + self._firsts[source]
        rows: list[int] = found.tolist()
        return rows

    def _keys(self, source: int, epoch: int) -> tuple[int, ...]:
        of_source = (source,) if source else ()  # the first is keyed as one alone
        return round_keys("rows", self.seed, *of_source, epoch)

    def epochs(self, samples: int) -> list[float]:
        """Return how often each source was gone through after the first `samples` places."""
        done = [samples] if len(self.counts) == 1 else self._mix.counts(samples)
        return [number / count for number, count in zip(done, self.counts, strict=True)]
