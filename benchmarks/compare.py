"""Where Tessera stands beside its peers and its targets: all measured now, on this machine.

    python -m benchmarks.compare                      all parts, in an hour or two
    python -m benchmarks.compare only=step,products   some of them

Each part is a benchmark of its own that runs both sides in turn in one run; its own page says how.
A line holds median and spread of ours and of theirs, the target, the number that is judged, and
whether it is met. Rows go to results/compare.jsonl. Exit code 64: an unknown part.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

from benchmarks import (
    determinism,
    finetune_figures,
    overheads,
    peak_memory,
    start_up,
    train_step_figures,
)
from benchmarks.figure import Figure
from benchmarks.in_turn import Spread, append_row, chosen, machine, read_texts
from benchmarks.roofline import cost
from benchmarks.scaling import checkpoints, host, loaders
from launch.exit_codes import BAD_CONFIG, FINISHED

RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
PARTS: dict[str, Callable[[], list[Figure]]] = {
    "step": train_step_figures.figures,
    "products": cost.figures,
    "finetune": finetune_figures.figures,
    "memory": peak_memory.figures,
    "start": start_up.figures,
    "determinism": determinism.figures,
    "overheads": overheads.figures,
    "host": host.figures,
    "loaders": loaders.figures,
    "checkpoints": checkpoints.figures,
}


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/compare.jsonl; return the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return FINISHED
    try:
        parts = chosen(read_texts(words, {"only": ",".join(PARTS)})["only"], PARTS)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return BAD_CONFIG
    print(HEADER)
    for name, measure in parts.items():
        found = _apart(measure)
        print("\n".join(map(line, found)), flush=True)
        append_row(RESULTS, row(name, found))
    return FINISHED


def _apart(measure: Callable[[], list[Figure]]) -> list[Figure]:
    """Return what a part measures in a process of its own, that no part before it has changed.

    Threads above all: what a part forks would wait for those of another for ever.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure).result()


HEADER = (
    "| figure | ours | theirs | target | measured | met |\n"
    "|---|---|---|---|---|---|"
)  # fmt: skip


def line(figure: Figure) -> str:
    """Return a figure as a line of the table."""
    cells = (
        figure.name,
        _spread(figure.ours),
        "" if figure.theirs is None else _spread(figure.theirs),
        figure.target,
        _number(figure.value),
        "yes" if figure.is_met else "no",
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: Spread) -> str:
    middle, low, high = (_number(values[name]) for name in ("median", "min", "max"))
    return f"{middle} [{low} - {high}]"


def _number(value: float) -> str:
    """Return three figures of a number, or all of a large one's whole part."""
    if 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    digits = next((d for limit, d in ((100, 0), (10, 1), (1, 2)) if abs(value) >= limit), 3)
    return f"{value:,.{digits}f}"


def row(part: str, figures: Sequence[Figure]) -> dict[str, object]:
    """Return the row of a part, as plain values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "part": part,
        "figures": [asdict(figure) | {"is_met": figure.is_met} for figure in figures],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
