"""One thing that the doctor found, and how it reads on a screen. Standard library only."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trainer.sizes import in_memory

GIB = 1 << 30
NAME_WIDTH = 15
RANKS = "ranks"
"""The check that a rank may fail alone."""
_INDENT = " " * (8 + NAME_WIDTH + 1)
_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[1;31m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    needed: str = ""
    """What there should be; empty: the finding is for information."""
    is_fine: bool = True
    remedy: str = ""

    @staticmethod
    def of_size(check: str, free: int, total: int, least: int, remedy: str) -> "Finding":
        return Finding(
            check=check, found=f"{in_memory(free)} of {in_memory(total)} free",
            needed=f">= {in_memory(least)}", is_fine=free >= least, remedy=remedy,
        )  # fmt: skip


def line(finding: Finding) -> str:
    """Return it as one line, for files and pipes."""
    if finding.is_fine:
        return f"  ok    {finding.check:<{NAME_WIDTH}} {finding.found}"
    return (
        f"  BAD   {finding.check:<{NAME_WIDTH}} {finding.found}, needed {finding.needed}; "
        f"{finding.remedy}"
    )


def screen(finding: Finding, width: int, has_colors: bool) -> str:
    """Return it for a terminal: at most `width` columns, what is bad on lines of its own."""
    word, color = ("ok ", _GREEN) if finding.is_fine else ("BAD", _RED)
    mark = f"{color}{word}{_PLAIN}" if has_colors else word
    parts = [finding.found]
    if not finding.is_fine:
        parts += [f"needed: {finding.needed}", f"remedy: {finding.remedy}"]
    lines = [row for part in parts for row in textwrap.wrap(part, max(20, width - len(_INDENT)))]
    return f"  {mark}   {finding.check:<{NAME_WIDTH}} " + f"\n{_INDENT}".join(lines)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the last line."""
    bad = list(dict.fromkeys(finding.check for finding in findings if not finding.is_fine))
    if not bad:
        return f"ready: {len(findings)} checks, nothing is in the way"
    count = f"{len(bad)} problem{'s' if len(bad) > 1 else ''}"
    return f"not ready: {count}: {', '.join(bad)}"


def to_text(findings: Sequence[Finding]) -> str:
    """Return findings as they travel between processes."""
    return json.dumps([asdict(finding) for finding in findings])


def from_text(text: str) -> list[Finding]:
    """Undo `to_text`."""
    return [Finding(**values) for values in json.loads(text)]
