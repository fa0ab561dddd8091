"""Measure every cell and write the table into docs/models.md, between its two marks."""

import sys
from pathlib import Path

from benchmarks.parity.cells import CELLS
from benchmarks.parity.oracle import specs

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FIRST, LAST = "<!-- table: python -m benchmarks.parity -->", "<!-- end of table -->"


def main() -> int:
    """Return 1 where a cell is above its limit; the table is written all the same."""
    rows, failed = [], []
    for name, spec in specs().items():
        cells = []
        for column, (measure, limit) in CELLS.items():
            value = measure(spec)
            cells.append(f"{value:.0e}" if value else "0")
            if value > limit:
                failed.append(f"{name}: {column} differs by {value:.1e}, allowed are {limit:.0e}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    limits = " | ".join(f"{limit:.0e}" if limit else "0" for _, limit in CELLS.values())
    header = f"| | {' | '.join(CELLS)} |\n|{'---|' * (len(CELLS) + 1)}\n| *limit* | {limits} |"
    before, _, rest = PAGE.read_text().partition(FIRST)
    _, _, after = rest.partition(LAST)
    table = "\n".join([header, *rows])
    PAGE.write_text(f"{before}{FIRST}\n{table}\n{LAST}{after}")
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
