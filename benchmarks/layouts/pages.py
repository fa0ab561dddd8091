"""Tables of a page of docs/, each between two marks, written anew."""

from pathlib import Path

from trainer.verify.compare import FIRST_STEP
from trainer.verify.verify import Verdict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
LATER = ("curve", "loaded", "resumed")


def replace_table(name: str, lines: list[str]) -> None:
    """Put a Markdown table between the marks `<!-- name -->` and `<!-- end -->` of the page."""
    text = PAGE.read_text()
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    if not mark or not end:
        raise ValueError(f"{PAGE} has no marks for the table {name!r}; put them where it belongs")
    PAGE.write_text("".join((before, mark, *(line + "\n" for line in lines), end, after)))


def deviations(verdicts: list[Verdict]) -> list[str]:
    """Return the table of how far each layout lies from one process."""
    columns = (*FIRST_STEP, *LATER)
    lines = [f"| layout | ranks | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for verdict in verdicts:
        found = {check.deviation.quantity: check.deviation.value for check in verdict.checks}
        cells = " | ".join(f"{found[name]:.1e}" if found[name] else "0" for name in columns)
        lines.append(f"| {verdict.layout.name} | {verdict.layout.processes} | {cells} |")
    return lines


def costs(rows: list[dict[str, object]]) -> list[str]:
    """Return the table of step time and memory beside the plain step."""
    lines = [
        "| layout | ranks | step, ms | beside plain | memory of a rank, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {row['ranks']} | {row['step_ms']:.0f} | "
            f"{row['ratio']:.2f} [{row['ratio_min']:.2f} - {row['ratio_max']:.2f}] | "
            f"{row['mib']:.0f} |"
        )
    return lines
