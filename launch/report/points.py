"""metrics.jsonl as columns of numbers: a million points in a few seconds, on a login node too."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.trackers.spool import METRICS

BLOCK = 1 << 21  # bytes that are read at once, as one JSON text
_NO_NUMBERS = ("step", "split", "time")
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Columns:
    """The points of one split, in the order of their steps."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[float]" = field(default_factory=lambda: array("d"))
    values: "dict[str, array[float]]" = field(default_factory=dict)
    """By the name in metrics.jsonl; NaN where a point lacks it, and where it was none."""

    _series: "dict[str, tuple[array[int], array[float]]]" = field(default_factory=dict)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append lines, all of them with a step."""
        before = len(self.steps)
        self._series.clear()
        self.steps.extend([line["step"] for line in lines])
        self.times.extend(_numbers([line.get("time") for line in lines]))
        for name in sorted(set().union(*lines).difference(_NO_NUMBERS)):
            found = _numbers([line.get(name) for line in lines])
            if name not in self.values and any(map(_is_something, found)):
                self.values[name] = array("d", [math.nan]) * before
            if name in self.values:
                self.values[name].extend(found)
        for column in self.values.values():
            column.extend([math.nan] * (len(self.steps) - len(column)))

    def series(self, name: str) -> "tuple[array[int], array[float]]":
        """Return the steps and values of the points that have a number of this name."""
        if name not in self._series:
            self._series[name] = self._finite(self.values.get(name, array("d")))
        return self._series[name]

    def _finite(self, column: "array[float]") -> "tuple[array[int], array[float]]":
        if math.isfinite(sum(column)):
            return self.steps[: len(column)], column
        kept = [number for number, value in enumerate(column) if math.isfinite(value)]
        return (
            array("q", [self.steps[number] for number in kept]),
            array("d", [column[number] for number in kept]),
        )


@dataclass
class Points:
    """All of metrics.jsonl."""

    train: Columns = field(default_factory=Columns)
    evals: Columns = field(default_factory=Columns)
    others: list[dict[str, Any]] = field(default_factory=list)
    """Of other splits: phases, saves that failed."""
    last_eval: dict[str, Any] = field(default_factory=dict)
    """As it stands in the file, with its tables."""
    not_finite: list[int] = field(default_factory=list)
    """Steps whose logged loss is no finite number."""
    num_torn: int = 0
    """Lines that could not be read."""


def read_points(folder: Path) -> Points:
    """Return what a run logged; what a crash left of a line is counted and left out."""
    points = Points()
    for objects, num_torn in _blocks(folder / METRICS):
        points.num_torn += num_torn
        train = [line for line in objects if line["split"] == "train"]
        points.train.add(train)
        points.not_finite += [line["step"] for line in train if isinstance(line.get("loss"), str)]
        evals = [line for line in objects if line["split"] == "eval"]
        points.evals.add(evals)
        points.last_eval = evals[-1] if evals else points.last_eval
        points.others += [line for line in objects if line["split"] not in ("train", "eval")]
    return points


def _blocks(path: Path) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield the points of some lines, and how many lines held none."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            block = (block + file.readline()).strip()
            objects = _parsed(block) if block else []
            points = [line for line in objects if _is_point(line)]
            yield points, len(objects) - len(points)


def _parsed(block: bytes) -> list[Any]:
    """Return what the lines hold: at once, or one by one if any is torn."""
    try:
        found: list[Any] = json.loads(b"[" + block.replace(b"\n", b",") + b"]")
        if len(found) == block.count(b"\n") + 1:
            return found
    except (ValueError, RecursionError):
        pass
    return [_line(line) for line in block.split(b"\n") if line.strip()]


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_point(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("split"), str):
        return False
    step = line.get("step")
    return type(step) is int and 0 <= step < 1 << 62


def _numbers(values: list[Any]) -> "array[float]":
    try:
        return array("d", values)
    except (TypeError, OverflowError):  # some are no numbers
        return array("d", map(number, values))


def number(value: Any) -> float:
    """Return a value of metrics.jsonl as a number; NaN for what is none."""
    if isinstance(value, str):
        return _WORDS.get(value, math.nan)
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _is_something(value: float) -> bool:
    return not math.isnan(value)
