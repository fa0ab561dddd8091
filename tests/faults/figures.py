"""The figures of the acceptance tests: one line for each, and the table of docs/reliability.md.

A test records what it measured through the fixture `figure`, under the number of its acceptance
test: `figure("A1 kills", 100, "")`. With TESSERA_FIGURES=FILE set, each becomes a line of FILE;
`python -m tests.faults.figures FILE` writes the newest of every name into the page.
"""

import json
import sys
import time
from pathlib import Path

from trainer.record import read_lines

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def append(file: Path, test: str, name: str, value: float | str, unit: str) -> None:
    """Add one figure to a file."""
    line = {
        "name": name, "value": value, "unit": unit, "test": test, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def table(file: Path) -> str:
    """Return the newest figure of each name as a table, in the order of the acceptance tests."""
    newest = {line["name"]: line for line in read_lines(file)}
    rows = [
        f"| {name} | {_plain(line['value'])} {line['unit']} "
        f"| {_file(line['test'])} | {line['date']} |"
        for name, line in sorted(newest.items(), key=lambda item: (_number(item[0]), item[0]))
    ]
    return "\n".join(["| Figure | Value | Test, in tests/ | Date |", "|---|---|---|---|", *rows])


def _file(test: str) -> str:
    return f"`{test.split('::')[0].removeprefix('tests/')}`"


def _number(name: str) -> int:
    """Return 12 of `A12 hung rank`; what has no number comes last."""
    digits = name.split()[0].removeprefix("A")
    return int(digits) if digits.isdigit() else 1000


def _plain(value: float | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def write_page(file: Path, page: Path = PAGE) -> None:
    """Put the table between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}; put them where the table goes")
    before, rest = text.split(BEGIN)
    behind = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{table(file)}\n\n{END}{behind}", encoding="utf-8")


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
