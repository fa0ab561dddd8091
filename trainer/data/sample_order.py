"""Which row or document stands at each place of the run: shuffled, and mixed from sources."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from trainer.data.eras import Eras
from trainer.data.order import permute_all, round_keys


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """A pure function of the place, in memory that does not grow with the data.

    A place belongs to a source, of which it is the k-th sample: permute(k mod its count, key(seed,
    source, k div its count)). So each source is gone through again and again, in another order
    each time, however often the others were.
    """

    counts: tuple[int, ...]
    """Rows or documents of each source that is there; they are numbered through all sources."""
    numbers: tuple[int, ...] = (0,)
    """Which source of the run each of them is."""
    eras: Eras

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def locate(self, samples: np.ndarray) -> list[int]:
        """Return the row or document of each place of the run; ValueError where its source is not
        there."""
        places = np.zeros(len(samples), np.int64)
        numbers = samples
        if not self._is_alone:
            pairs = np.array([self._place(sample) for sample in samples.tolist()], np.int64)
            places, numbers = pairs.reshape(-1, 2).T
        epochs, indices = np.divmod(numbers, np.array(self.counts)[places])
        found = np.empty_like(numbers)
        for place, epoch in set(zip(places.tolist(), epochs.tolist(), strict=True)):
            is_here = (places == place) & (epochs == epoch)
            keys = self._keys(self.numbers[place], epoch)
            own = permute_all(indices[is_here], self.counts[place], keys)
            found[is_here] = own + self._firsts[place]
        rows: list[int] = found.tolist()
        return rows

    @property
    def _is_alone(self) -> bool:
        return len(self.eras.eras) == 1 and len(self.eras.eras[0].present) == 1

    def _place(self, sample: int) -> tuple[int, int]:
        """Return which of the sources that are there a sample is from, and its number there."""
        source, number = self.eras.locate(sample)
        if source not in self.numbers:
            raise ValueError(
                f"sample {sample} is from a source that data.sources had before (number {source} "
                "of the run's) and has not now; bring it back"
            )
        return self.numbers.index(source), number

    def _keys(self, source: int, epoch: int) -> tuple[int, ...]:
        of_source = (source,) if source else ()  # the first is keyed as one alone
        return round_keys("rows", self.eras.seed, *of_source, epoch)

    def epochs(self, samples: int) -> list[float]:
        """Return how often each source was gone through after the first `samples` places."""
        done = [*self.eras.done(samples), *[0] * (1 + max(self.numbers))]
        pairs = zip(self.numbers, self.counts, strict=True)
        return [done[number] / count for number, count in pairs]
