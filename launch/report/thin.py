"""A curve of any length as few enough points to draw: of each piece its mean, least and most."""

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

MAX_POINTS = 1200  # a chart is some 600 pixels wide, and half of it can be zoomed into


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What is drawn: every point, or for each piece of the steps one."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    """Empty where every point is there."""
    highs: list[float]
    num_points: int
    """Before."""

    @property
    def points_each(self) -> float:
        """How many points of the run stand behind one of the curve."""
        return self.num_points / max(1, len(self.steps))


def thinned(steps: "array[int]", values: "array[float]", most: int = MAX_POINTS) -> Curve:
    """Return a curve of at most `most` points; all `values` are finite, `steps` ascend."""
    count = len(steps)
    if count <= most:
        return Curve(
            steps=list(map(float, steps)), means=list(values), lows=[], highs=[], num_points=count
        )
    first, width = steps[0], (steps[-1] - steps[0]) / most
    borders = [bisect_left(steps, first + width * part) for part in range(most)] + [count]
    pieces = [(a, b) for a, b in pairwise(borders) if a < b]
    found = [values[a:b] for a, b in pieces]
    return Curve(
        steps=[(steps[a] + steps[b - 1]) / 2 for a, b in pieces],
        means=[sum(piece) / len(piece) for piece in found],
        lows=[min(piece) for piece in found],
        highs=[max(piece) for piece in found],
        num_points=count,
    )
