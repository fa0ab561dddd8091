"""What grows with ranks, samples and tensors, and what must not: one line for each figure.

    python -m benchmarks.scaling                        all parts, in five minutes
    python -m benchmarks.scaling only=loader,checkpoint

Rows go to results/scaling.jsonl. Exit code 1: a figure missed its target; 64: an unknown part.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.compare import HEADER, line, row
from benchmarks.figure import Figure
from benchmarks.in_turn import append_row, chosen, read_texts
from benchmarks.scaling import checkpoints, host, loaders
from launch.exit_codes import BAD_CONFIG, FINISHED

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scaling.jsonl"
PARTS: dict[str, Callable[[], list[Figure]]] = {
    "host": host.figures,
    "loader": loaders.figures,
    "checkpoint": checkpoints.figures,
}


def figures() -> list[Figure]:
    """Measure all parts."""
    return [figure for part in PARTS.values() for figure in part()]


def main(words: list[str]) -> int:
    """Measure, print and store; return the exit code."""
    try:
        parts = chosen(read_texts(words, {"only": ",".join(PARTS)})["only"], PARTS)
    except ValueError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return BAD_CONFIG
    is_met = True
    print(HEADER)
    for name, measure in parts.items():
        found = measure()
        is_met = is_met and all(figure.is_met for figure in found)
        print("\n".join(map(line, found)), flush=True)
        append_row(RESULTS, row(name, found))
    return FINISHED if is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
