"""Which labels a classifier takes for which: a table at the end, of the last evaluation."""

import logging
from dataclasses import dataclass
from typing import Any

from trainer.callbacks.protocol import Callback
from trainer.progress import Progress

log = logging.getLogger(__name__)
WIDTH = 8  # characters of a column


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Print the confusion table, or of many labels the pairs that are confused most often."""

    max_labels: int = 12
    """Labels that a table may have."""
    num_pairs: int = 10
    """Pairs that are printed instead of a larger table."""

    def build(self) -> "ConfusionCallback":
        return ConfusionCallback(self)


class ConfusionCallback(Callback):
    """Keeps the newest table, prints at the end."""

    def __init__(self, spec: Confusion) -> None:
        self.spec = spec
        self.table: dict[str, Any] | None = None

    def on_eval(self, progress: Progress, metrics: dict[str, Any]) -> None:
        self.table = metrics.get("confusion")

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        if self.table is None or not finished:
            return
        for line in lines_of(self.table, self.spec.max_labels, self.spec.num_pairs):
            log.info("%s", line)


def lines_of(table: dict[str, Any], max_labels: int = 12, num_pairs: int = 10) -> list[str]:
    """Return the table as text, or the pairs that are confused most where it is large."""
    names, counts = table["labels"], table["rows_are_truth"]
    if len(names) <= max_labels:
        return table_lines(names, counts)
    return pair_lines(names, counts, num_pairs)


def table_lines(names: list[str], counts: list[list[int]]) -> list[str]:
    """Return a table with a row for each true label and a column for each guess."""
    width = max(len("truth"), *map(len, names))
    heads = (name[: WIDTH - 1].rjust(WIDTH) for name in names)
    lines = [
        "",
        "confusion (columns are guesses):",
        f"  {'truth':<{width}}{''.join(heads)}  recall",
    ]
    for number, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = "".join(f"{count:>{WIDTH}}" for count in row)
        recall = f"{row[number] / sum(row):>7.1%}" if sum(row) else "      -"
        lines.append(f"  {name:<{width}}{cells} {recall}")
    return lines


def pair_lines(names: list[str], counts: list[list[int]], num_pairs: int) -> list[str]:
    """Return the most frequent confusions, one a line."""
    pairs = sorted(
        (-count, names[truth], names[guess])
        for truth, row in enumerate(counts)
        for guess, count in enumerate(row)
        if count and truth != guess
    )
    lines = ["", f"confused most often, of {len(names)} labels:"]
    return lines + [
        f"  {-count:>6} x {truth} taken for {guess}" for count, truth, guess in pairs[:num_pairs]
    ]
