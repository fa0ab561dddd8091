"""Which sources a run has had, by name and content, and with which shares: what its state says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise, zip_longest
from math import gcd, lcm
from typing import Any

from trainer.data.eras import Era, Eras
from trainer.drift import ALLOW_MIX

_FINGERPRINT = 16  # characters of one, which tell sources apart well enough


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The sources that a run ever had, and its eras. A source keeps its number, which is part of
    the key of its shuffle, whatever its place in the config becomes."""

    names: tuple[str, ...]
    """By number; a source that is alone may have none."""
    fingerprints: tuple[str, ...]
    """Of the tokens of each."""
    eras: Eras

    @classmethod
    def first(
        cls, names: Sequence[str], fingerprints: Sequence[str], weights: Sequence[Fraction],
        seed: int,
    ) -> "Mixture":  # fmt: skip
        """Return that of a run which begins with these."""
        return cls(
            names=tuple(names),
            fingerprints=tuple(each[:_FINGERPRINT] for each in fingerprints),
            eras=Eras.begun(_in_lowest_terms(weights), seed),
        )

    @classmethod
    def load(cls, state: dict[str, Any], seed: int) -> "Mixture":
        """Return what `state` returned."""
        eras = (
            Era(first=first, weights=tuple(weights), done=tuple(done))
            for first, weights, done in state["eras"]
        )
        return cls(
            names=tuple(state["sources"]), fingerprints=tuple(state["sources"].values()),
            eras=Eras(seed=seed, eras=tuple(eras)),
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON has it."""
        return {
            "sources": dict(zip(self.names, self.fingerprints, strict=True)),
            "eras": [[era.first, list(era.weights), list(era.done)] for era in self.eras.eras],
        }

    @property
    def is_plain(self) -> bool:
        """Whether it is one source alone, without a name."""
        return self.names == ("",)

    def knowing(self, names: Sequence[str], fingerprints: Sequence[str]) -> "Mixture":
        """Return it with these sources in it; ValueError for one that has become another."""
        known = dict(enumerate(zip(self.names, self.fingerprints, strict=True)))
        own = [fingerprint[:_FINGERPRINT] for fingerprint in fingerprints]
        for number, name, mine in zip(self._numbers(names, own), names, own, strict=True):
            before = known.get(number, (name, mine))[1]
            if before != mine:
                of, anew = "", ""
                if name:
                    of = f" of data.sources.{name}"
                    anew = f"give it a new name and resume_allow=[{ALLOW_MIX}], "
                raise ValueError(
                    f"the data's fingerprint{of} is {mine}, the checkpoint was made with {before}; "
                    f"bring the old data and tokenizer back, {anew}or start anew with name=... or "
                    "resume=never"
                )
            known[number] = (name, mine)
        every, prints = zip(*known.values(), strict=True)
        return replace(self, names=every, fingerprints=prints)

    def _numbers(self, names: Sequence[str], fingerprints: Sequence[str]) -> list[int]:
        """Return which sources these are: those of the same names, else renamed ones of the same
        content, else new ones."""
        numbers = {name: self.names.index(name) for name in names if name in self.names}
        for name, fingerprint in zip(names, fingerprints, strict=True):
            taken = set(numbers.values())
            if name not in numbers:
                here = [n for n, known in enumerate(self.fingerprints) if known == fingerprint]
                free = [n for n in here if n not in taken]
                numbers[name] = free[0] if free else max((len(self.names), *(1 + n for n in taken)))
        return [numbers[name] for name in names]

    def goes_on_as(self, other: "Mixture") -> bool:
        """Return whether the other one begins as this one, and may have changed since."""
        mine, others = self.eras.eras, other.eras.eras
        return self.eras.seed == other.eras.seed and mine == others[: len(mine)]

    def changed(self, first: int, shares: dict[str, Fraction], *, is_allowed: bool) -> "Mixture":
        """Return it with these shares from global sample `first` on: itself where they are those of
        its last era. ValueError where they are not, and may not be."""
        weights = _in_lowest_terms([shares.get(name, Fraction(0)) for name in self.names])
        before = self.eras.eras[-1].weights
        if all(old == new for old, new in zip_longest(before, weights, fillvalue=0)):
            return self
        if not is_allowed:
            raise ValueError(
                f"data.sources had the shares {self.in_words(before)} when this checkpoint was "
                f"saved and have {self.in_words(weights)} now; set them back, or allow it with "
                f"resume_allow=[{ALLOW_MIX}]"
            )
        return replace(self, eras=self.eras.then(first, weights))

    def change_in(self, first: int, last: int) -> dict[str, Any] | None:
        """Return the shares before and behind the newest change that lies at one of these samples,
        and how many samples of each source came before it; None: there is none."""
        pairs = list(pairwise(self.eras.eras))
        found = [(old, new) for old, new in pairs if first <= new.first <= last]
        if not found:
            return None
        old, new = found[-1]
        return {
            "first_sample": new.first, "was": self._shares(old.weights),
            "becomes": self._shares(new.weights),
            "done": dict(zip(map(_label, self.names), new.done, strict=False)),
        }  # fmt: skip

    def _shares(self, weights: Sequence[int]) -> dict[str, int]:
        pairs = zip(map(_label, self.names), weights, strict=False)
        return {name: weight for name, weight in pairs if weight}

    def in_words(self, weights: Sequence[int]) -> str:
        """Return the shares of the sources that are there, for people."""
        return ", ".join(f"{name} {weight}" for name, weight in self._shares(weights).items())


def _label(name: str) -> str:
    """Return what people call a source."""
    return name or "data.path"


def _in_lowest_terms(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Return integers with the same proportions: equal ones for equal shares."""
    scale = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    return tuple(weight // gcd(*whole) for weight in whole)
