"""What a run really trained on, read from its ledgers alone."""

from pathlib import Path
from typing import Any

from trainer.record import read_lines

Line = dict[str, Any]


def ledger(folder: Path, rank: int = 0) -> list[Line]:
    return read_lines(folder / f"ledger/rank{rank:05d}.jsonl")


def ledgers(folder: Path) -> list[Line]:
    """Return the lines of all ranks that ever took part."""
    return [line for file in sorted((folder / "ledger").iterdir()) for line in read_lines(file)]


def committed(lines: list[Line]) -> dict[int, list[Line]]:
    """Return, for each step, the lines that the run's weights come from.

    An attempt begins behind the checkpoint that it took up: what earlier ones executed from there
    on was lost.
    """
    steps: dict[int, list[Line]] = {}
    end = max((line["step"] for line in lines), default=0) + 1
    for attempt in sorted({line["attempt"] for line in lines}, reverse=True):
        own = [line for line in lines if line["attempt"] == attempt]
        for line in own:
            if line["step"] < end:
                steps.setdefault(line["step"], []).append(line)
        end = min(end, *(line["step"] for line in own))
    return dict(sorted(steps.items()))


def samples_of(lines: list[Line]) -> list[int]:
    """Return the samples of some lines in ascending order, each as often as it was trained on."""
    return sorted(
        n for line in lines for first, last in line["samples"] for n in range(first, last)
    )
