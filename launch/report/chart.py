"""One chart: a picture that needs no script, and the numbers from which a script draws it anew.

charts.js draws as `svg` does here; the two must agree on sizes, classes and scales.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from launch.report.axes import linear_ticks, log_ticks, short
from launch.report.thin import Curve
from trainer.columns import exact

WIDTH, HEIGHT = 600, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 18, 24
MAX_DOTS = 60  # points of a line that are shown as dots too
NUM_STYLES = 6  # colours and dashes, in turn


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named curve; `style` is its number among colours and dashes."""

    name: str
    curve: Curve
    style: int = 0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: str
    """restart, rewind, skipped, failed"""
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over steps that share a scale."""

    title: str
    unit: str
    lines: list[Line]
    is_log: bool = False

    @property
    def can_be_log(self) -> bool:
        """Whether all numbers are positive."""
        return all(
            value > 0 for line in self.lines for value in [*line.curve.means, *line.curve.lows]
        )

    @property
    def words(self) -> str:
        """What the curves show, for who does not see them."""
        return "; ".join(map(_described, self.lines))

    def plain(self) -> dict[str, Any]:
        """Return what the script draws from."""
        return {
            "title": self.title,
            "unit": self.unit,
            "log": self.is_log,
            "lines": [_plain(line) for line in self.lines],
        }


def _described(line: Line) -> str:
    curve = line.curve
    lowest = min(range(len(curve.means)), key=curve.means.__getitem__)
    return (
        f"{line.name}: {exact(curve.means[0])} at step {curve.steps[0]:,.0f}, "
        f"{exact(curve.means[-1])} at step {curve.steps[-1]:,.0f}, "
        f"lowest {exact(curve.means[lowest])} at step {curve.steps[lowest]:,.0f}"
    )


def _plain(line: Line) -> dict[str, Any]:
    curve = line.curve
    columns = {"x": curve.steps, "y": curve.means, "low": curve.lows, "high": curve.highs}
    rounded = {name: [float(f"{v:.7g}") for v in values] for name, values in columns.items()}
    return {"name": line.name, "style": line.style % NUM_STYLES, **rounded}


@dataclass(frozen=True)
class Scale:
    """From numbers to places on the paper."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(each) for each in (self.low, self.high, value))
            if self.is_log
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.stop - self.start), 1)


def svg(chart: Chart, span: tuple[float, float], marks: Sequence[Mark]) -> str:
    """Return the chart over the steps of `span`."""
    x = Scale(*span, LEFT, WIDTH - RIGHT)
    y = Scale(*_range(chart), HEIGHT - BOTTOM, TOP, chart.is_log)
    parts = [
        _grid(x, y),
        *(_mark(mark, x) for mark in marks),
        *(_line(line, x, y) for line in chart.lines),
    ]
    label, box = escape(f"{chart.title}. {chart.words}"), f"0 0 {WIDTH} {HEIGHT}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _range(chart: Chart) -> tuple[float, float]:
    """Return the lowest and the highest value, with some room around them."""
    curves = [line.curve for line in chart.lines]
    low = min(value for curve in curves for value in [*curve.means, *curve.lows])
    high = max(value for curve in curves for value in [*curve.means, *curve.highs])
    if chart.is_log:
        room = max((high / low) ** 0.05, 1.02)
        return low / room, high * room
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room if low < 0 or low - room > 0 else 0.0, high + room


def _grid(x: Scale, y: Scale) -> str:
    ticks = log_ticks(y.low, y.high) if y.is_log else linear_ticks(y.low, y.high)
    rows = "".join(
        f'<path class="grid" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>'
        f'<text class="tick y" x="{LEFT - 7}" y="{y(tick) + 4}">{short(tick)}</text>'
        for tick in ticks
    )
    columns = "".join(
        f'<text class="tick" x="{x(tick)}" y="{HEIGHT - BOTTOM + 17}">{short(tick)}</text>'
        for tick in linear_ticks(x.low, x.high)
        if tick == round(tick)
    )
    return (
        f'{rows}{columns}<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="tick name" x="{LEFT - 7}" y="{HEIGHT - BOTTOM + 17}">step</text>'
    )


def _mark(mark: Mark, x: Scale) -> str:
    if not x.low <= mark.step <= x.high:
        return ""
    place = x(mark.step)
    return (
        f'<g class="mark {mark.kind}"><title>{escape(mark.text)}</title>'
        f'<path d="M{place} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<use href="#{mark.kind}" x="{place}" y="{TOP - 14}"/></g>'
    )


def _line(line: Line, x: Scale, y: Scale) -> str:
    curve, kind = line.curve, f"s{line.style % NUM_STYLES}"
    places = [f"{x(step)} {y(value)}" for step, value in zip(curve.steps, curve.means, strict=True)]
    band = dots = ""
    if curve.lows:
        above = [f"{x(s)} {y(v)}" for s, v in zip(curve.steps, curve.highs, strict=True)]
        below = [f"{x(s)} {y(v)}" for s, v in zip(curve.steps, curve.lows, strict=True)]
        band = f'<path class="band {kind}" d="M{"L".join([*above, *reversed(below)])}Z"/>'
    elif len(places) <= MAX_DOTS:
        dots = "".join(
            f'<circle class="{kind}" cx="{place.split()[0]}" cy="{place.split()[1]}" r="2.5"/>'
            for place in places
        )
    return f'{band}<path class="line {kind}" d="M{"L".join(places)}"/>{dots}'
