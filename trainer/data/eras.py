"""Which sample of which source stands at each place of a run, whose mixture may change."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import zip_longest

import numpy as np

from trainer.data.mixing import Mix


@dataclass(frozen=True, kw_only=True)
class Era:
    """A stretch of a run in which the shares of its sources stay the same."""

    first: int
    """The global sample that it begins with."""
    weights: tuple[int, ...]
    """Share of each source, by number; 0, or none behind the last: it is not there."""
    done: tuple[int, ...]
    """How many samples of each source come before."""

    @cached_property
    def present(self) -> list[int]:
        return [source for source, weight in enumerate(self.weights) if weight]


@dataclass(frozen=True, kw_only=True)
class Eras:
    """All mixtures of a run. A pure function of the place, in memory that grows with the changes.

    A source goes on behind a change where it was: first come, ascending, those of its samples that
    the block of the mixture before had still to bring, then those behind that block. So each one's
    samples 0, 1, 2, .. come up exactly once, whatever its shares were and whenever it was there.
    """

    seed: int
    eras: tuple[Era, ...]

    @classmethod
    def begun(cls, weights: tuple[int, ...], seed: int) -> "Eras":
        """Return that of a run which begins with these shares."""
        return cls(seed=seed, eras=(Era(first=0, weights=weights, done=(0,) * len(weights)),))

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the source of a place in the run, and which of that source's samples it is."""
        era = self._era(sample)
        part, number = self._mixes[era].locate(sample - self.eras[era].first)
        source = self.eras[era].present[part]
        for border in reversed(self._borders[:era]):
            number = border.number_before(source, number)
        return source, number

    def done(self, samples: int) -> list[int]:
        """Return how many of the first `samples` places are each source's, at a block's end."""
        era = self._era(samples)
        own = self._mixes[era].counts(samples - self.eras[era].first)
        return self._sum(era, own)

    def exactly_done(self, samples: int) -> list[int]:
        """Do as `done` at any place, as slowly as a block is long."""
        era = self._era(samples)
        rest = self._mixes[era].rest(samples - self.eras[era].first)
        return self._sum(era, [behind - len(left) for left, behind in rest])

    def then(self, first: int, weights: tuple[int, ...]) -> "Eras":
        """Return them with one more era, which begins at global sample `first`."""
        era = Era(first=first, weights=weights, done=tuple(self.exactly_done(first)))
        return replace(self, eras=(*self.eras, era))

    def until(self, sample: int) -> tuple[Era, ...]:
        """Return those that have a place before this one."""
        return tuple(era for era in self.eras if era.first < sample)

    def _sum(self, era: int, own: list[int]) -> list[int]:
        """Add what the sources that are there in an era had in it to what they had before."""
        one = self.eras[era]
        total = [before for before, _ in zip_longest(one.done, one.weights, fillvalue=0)]
        for source, number in zip(one.present, own, strict=True):
            total[source] += number
        return total

    def _era(self, sample: int) -> int:
        return bisect_right(self._firsts, sample) - 1

    @cached_property
    def _firsts(self) -> list[int]:
        return [era.first for era in self.eras]

    @cached_property
    def _mixes(self) -> list[Mix]:
        return [
            Mix(tuple(Fraction(era.weights[n]) for n in era.present), self.seed, era.first)
            for era in self.eras
        ]

    @cached_property
    def _borders(self) -> "list[_Border]":
        """Between each era and the next."""
        return [
            _Border(dict(zip(era.present, mix.rest(first - era.first), strict=True)))
            for era, mix, first in zip(self.eras, self._mixes, self._firsts[1:], strict=False)
        ]


@dataclass(frozen=True)
class _Border:
    """How the samples of each source are numbered on behind a change."""

    rest: dict[int, tuple[np.ndarray, int]]
    """Of the sources before it: numbers left over in the running block, and the one behind it."""

    def number_before(self, source: int, number: int) -> int:
        """Return which sample, as counted in the era before, is number `number` of the next."""
        if source not in self.rest:
            return number
        left, behind = self.rest[source]
        return int(left[number]) if number < len(left) else behind + number - len(left)
