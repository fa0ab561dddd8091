"""Numbers by their name: columns of many points, read from text when somebody asks for them.

Standard library only.
"""

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NO_NUMBERS = ("step", "split")
WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Column:
    """Numbers of one name; those of many points stay text until somebody asks for them."""

    def __init__(self, before: int) -> None:
        """`before` points lack it."""
        self._parts: list[array[float] | bytes] = [array("d", [math.nan] * before)] * (before > 0)
        self.length = before

    def extend(self, part: "array[float] | bytes", count: int) -> None:
        """Append so many numbers, or the text of them with commas between."""
        self._parts.append(part)
        self.length += count

    def at(self, end: int) -> float:
        """Return the first number (0) or the last (-1), without reading those in between."""
        return _read(self._parts[end])[end]

    def numbers(self) -> "array[float]":
        """Return all of them."""
        whole = array("d")
        for part in self._parts:
            whole.extend(_read(part))
        self._parts = [whole]
        return whole


@dataclass
class Columns:
    """The points of one split, in the order of their steps."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    _columns: dict[str, Column] = field(default_factory=dict)
    _series: "dict[str, tuple[array[int], array[float]]]" = field(default_factory=dict)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append lines, all of them with a step."""
        names = dict.fromkeys(name for line in lines for name in line if name not in _NO_NUMBERS)
        found = {name: _numbers([line.get(name) for line in lines]) for name in names}
        numbers = {n: column for n, column in found.items() if not all(map(math.isnan, column))}
        self.extend(array("q", [line["step"] for line in lines]), numbers)

    def extend(self, steps: "array[int]", found: "Mapping[str, array[float] | bytes]") -> None:
        """Append points by their columns, each with a number for every point."""
        for name, part in found.items():
            if name not in self._columns:
                self._columns[name] = Column(len(self.steps))
            self._columns[name].extend(part, len(steps))
        self.steps.extend(steps)
        self._series.clear()
        for column in self._columns.values():
            if missing := len(self.steps) - column.length:
                column.extend(array("d", [math.nan]) * missing, missing)

    @property
    def names(self) -> list[str]:
        """Those in metrics.jsonl that any point has a number of."""
        return list(self._columns)

    def column(self, name: str) -> "array[float]":
        """Return a number for each point: NaN where it lacks one, and where it was none."""
        found = self._columns.get(name)
        return found.numbers() if found else array("d", [math.nan]) * len(self.steps)

    def first(self, name: str) -> float:
        """Return the number of the first point; NaN where it has none."""
        return self._columns[name].at(0) if name in self._columns else math.nan

    def last(self, name: str) -> float:
        """Return the number of the last point; NaN where it has none."""
        return self._columns[name].at(-1) if name in self._columns else math.nan

    def series(self, name: str) -> "tuple[array[int], array[float]]":
        """Return the steps and values of the points that have a finite number of this name."""
        if name not in self._series:
            found = self._columns.get(name)
            self._series[name] = (
                self._finite(found.numbers()) if found else (array("q"), array("d"))
            )
        return self._series[name]

    def _finite(self, column: "array[float]") -> "tuple[array[int], array[float]]":
        if math.isfinite(sum(column)):
            return self.steps, column
        kept = [number for number, value in enumerate(column) if math.isfinite(value)]
        return (
            array("q", [self.steps[number] for number in kept]),
            array("d", [column[number] for number in kept]),
        )


def _read(part: "array[float] | bytes") -> "array[float]":
    if not isinstance(part, bytes):
        return part
    try:
        return array("d", json.loads(b"[%s]" % part))
    except ValueError:
        return _numbers(parsed(part.split(b",")))


def parsed(lines: list[bytes]) -> list[Any]:
    """Return what the lines hold: at once, or one by one if any is torn."""
    try:
        found: list[Any] = json.loads(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines):
            return found
    except (ValueError, RecursionError):
        pass
    return [_line(line) for line in lines]


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _numbers(values: list[Any]) -> "array[float]":
    try:
        return array("d", values)
    except (TypeError, OverflowError):  # some are no numbers
        return array("d", map(number, values))


def exact(value: float) -> str:
    """Return a number as a reader wants to compare it: six digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"


def number(value: Any) -> float:
    """Return a value of metrics.jsonl as a number; NaN for what is none."""
    if isinstance(value, str):
        return WORDS.get(value, math.nan)
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan
