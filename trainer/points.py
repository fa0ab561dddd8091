"""metrics.jsonl as columns of numbers: a million points in seconds, on a login node too.

Standard library only.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from trainer.columns import Columns, parsed

METRICS = "metrics.jsonl"
LOSS, TOKENS, TIME = "loss", "tokens_per_second", "time"
BLOCK = 1 << 17  # bytes that are read at once
_TRAIN, _OF_NUMBERS = b'"split": "train"', b"0123456789+-.eE,"


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

    @cached_property
    def speed(self) -> float | None:
        """Tokens per second: the median of all log points, which a slow first one does not move.

        Sorting a million takes a moment: it is kept, for points that are all there.
        """
        rates = self.train.series(TOKENS)[1]
        return median(rates) if rates else None

    def add(self, lines: list[Any]) -> None:
        """Append what lines hold; those that hold no point are counted."""
        found = [line for line in lines if _is_point(line)]
        self.num_torn += len(lines) - len(found)
        train = [line for line in found if line["split"] == "train"]
        self.train.add(train)
        self.not_finite += [line["step"] for line in train if isinstance(line.get(LOSS), str)]
        evals = [line for line in found if line["split"] == "eval"]
        self.evals.add(evals)
        self.last_eval = evals[-1] if evals else self.last_eval
        self.others += [line for line in found if line["split"] not in ("train", "eval")]


def read_points(folder: Path) -> Points:
    """Return what a run logged; what a crash left of a line is counted and left out."""
    points = Points()
    for lines in _blocks(folder / METRICS):
        train = [line for line in lines if _TRAIN in line]
        alike = _alike(train)
        if alike is not None:
            points.train.extend(*alike)
            lines = [line for line in lines if _TRAIN not in line]
        points.add(parsed([line for line in lines if line.strip()]))
    return points


def _blocks(path: Path) -> Iterator[list[bytes]]:
    """Yield some lines at a time."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield (block + file.readline()).split(b"\n")


def _alike(lines: list[bytes]) -> "tuple[array[int], dict[str, array[float] | bytes]] | None":
    """Return the steps and the columns of lines that name the same numbers in the same order.

    Nearly all do. No object is made of each line, no number is read that nobody asks for: that is
    most of JSON's work. None: some line is unlike the others, or holds more than numbers.
    """
    count, words = len(lines), b" ".join(lines).split()
    width = len(words) // max(1, count)
    if len(words) != width * count or not width:
        return None
    found: dict[str, array[float] | bytes] = {}
    try:
        for place in range(0, width, 2):
            name, values = words[place], words[place + 1 :: width]
            if words[place::width].count(name) != count or len(values) != count:
                return None
            opening, end = b"{" * (not place), b"}" if place + 2 == width else b","
            (key,) = json.loads(b"{%s0}" % name.removeprefix(opening))
            if key in found or not name.startswith(opening + b'"'):
                return None
            found[key] = _joined(values, end, keeps_text=key == "step") if key != "split" else b""
        steps = array("q", json.loads(b"[%s]" % found.pop("step")))
        if found.pop("split", None) is None or min(steps) < 0:
            return None
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
    return steps, {name: part for name, part in found.items() if part}


def _joined(words: list[bytes], end: bytes, *, keeps_text: bool) -> "array[float] | bytes":
    """Return the numbers of words that each have `end` behind them, as text; of equal ones as they
    are, unless that `keeps_text`."""
    first = words[0]
    if not keeps_text and words.count(first) == len(words) and first.endswith(end):
        value = json.loads(first[:-1])
        if value is None or (isinstance(value, int | float) and value == value):
            return array("d", [] if value is None else [value] * len(words))
    text = b"".join(words)
    if text.count(end) != len(words) or not text.endswith(end):
        raise ValueError
    text = text[:-1].replace(end, b",")
    if text.translate(None, _OF_NUMBERS):
        raise ValueError
    return text


def _is_point(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("split"), str):
        return False
    step = line.get("step")
    return type(step) is int and 0 <= step < 1 << 62
