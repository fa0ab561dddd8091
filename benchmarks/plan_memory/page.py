"""The table of docs/plan.md: what plans say beside what runs held."""

from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
MARK, END = "<!-- measured -->\n", "<!-- end -->\n"


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the table between the marks of the page."""
    before, _, rest = PAGE.read_text().partition(MARK)
    _, _, after = rest.partition(END)
    PAGE.write_text("".join((before, MARK, *(line + "\n" for line in table(rows)), END, after)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each run, and one for all of them."""
    lines = [
        "| run | ranks | planned, MB | tensor bytes, MB | off by | peak in | RSS, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['ranks']} | {row['planned'] / 1e6:.1f} | "
            f"{row['tensor_bytes'] / 1e6:.1f} | {_off(row):+.2%} | {row['phase']} | "
            f"{row['rss_bytes'] / 1e6:.0f} |"
        )
    offs = [abs(_off(row)) for row in rows]
    lines += [
        "",
        f"{len(rows)} runs: off by {median(offs):.2%} in the median, {max(offs):.2%} at most.",
    ]
    return lines


def _off(row: dict[str, Any]) -> float:
    return float(row["planned"] / row["tensor_bytes"] - 1)
