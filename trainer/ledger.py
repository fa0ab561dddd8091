"""Which steps of which starts a run's weights come from, read from the ledgers of all ranks.

Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.files import read_lines


@dataclass(frozen=True)
class Line:
    """What one rank wrote of one executed step."""

    rank: int
    attempt: int
    step: int
    samples: tuple[tuple[int, int], ...]
    """Global samples [first, last)."""
    data_rank: int
    """Ranks that share it (tensor parallel, stages of a pipeline) have the same samples."""
    passed_over: tuple[tuple[int, int], ...]
    """Samples before this step's that a rewind left out."""
    numbers: tuple[Any, ...]
    """Loss sum as hex, number of targets, whether the update was skipped: equal on all ranks."""

    @classmethod
    def of(cls, rank: int, line: dict[str, Any]) -> "Line":
        return cls(
            rank=rank,
            attempt=line["attempt"],
            step=line["step"],
            samples=tuple((first, last) for first, last in line["samples"]),
            passed_over=tuple((first, last) for first, last in line.get("passed_over", ())),
            data_rank=line.get("data_rank", rank),  # version 0.1 did not say
            numbers=(line["loss_sum"], line["num_targets"], line["skipped"]),
        )


@dataclass(frozen=True)
class Life:
    """An unbroken row of steps of one start, over all ranks: it ends with a crash or a rewind."""

    attempt: int
    number: int
    """0, 1, .. within the attempt."""
    lines: dict[int, list[Line]]
    """Of each step."""

    @property
    def first_step(self) -> int:
        return min(self.lines)

    @cached_property
    def gaps(self) -> dict[tuple[int, int], int]:
        """What a rewind before this life left out: samples, and the step behind them."""
        return {gap: step for step, lines in self.lines.items() for gap in lines[0].passed_over}

    @cached_property
    def ranks(self) -> dict[int, int]:
        """The data rank of every rank that wrote anything."""
        return {line.rank: line.data_rank for lines in self.lines.values() for line in lines}


def read_lives(folder: Path) -> list[Life]:
    """Return the lives of a run in the order in which they were lived.

    A rank's ledger is in the order of time: where its steps do not ascend, it went back.
    """
    found: dict[tuple[int, int], dict[int, list[Line]]] = {}
    for file in sorted((folder / "ledger").glob("rank*.jsonl")):
        for life, line in _numbered(int(file.stem.removeprefix("rank")), read_lines(file)):
            found.setdefault((line.attempt, life), {}).setdefault(line.step, []).append(line)
    return [Life(attempt, number, found[attempt, number]) for attempt, number in sorted(found)]


def _numbered(rank: int, objects: list[dict[str, Any]]) -> Iterator[tuple[int, Line]]:
    """Yield a rank's lines, each with the number of its life within the attempt."""
    life, attempt, step = 0, 0, 0
    for each in objects:
        if "samples" not in each:
            continue  # no step: a note about one
        line = Line.of(rank, each)
        if line.attempt != attempt:
            life = 0
        elif line.step <= step:
            life += 1
        attempt, step = line.attempt, line.step
        yield life, line


def surviving(lives: list[Life]) -> dict[int, Life]:
    """Return, for each step, the life whose work the run's weights come from.

    A life begins behind the checkpoint that it took up: what earlier ones executed from there on
    was lost.
    """
    owners: dict[int, Life] = {}
    end: int | None = None
    for life in reversed(lives):
        for step in life.lines:
            if end is None or step < end:
                owners[step] = life
        end = life.first_step if end is None else min(end, life.first_step)
    return dict(sorted(owners.items()))
