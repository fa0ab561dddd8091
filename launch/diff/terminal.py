"""Two runs on one screen of a terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.diff.series import Drift, relative
from launch.diff.sides import Pairs
from launch.visible_text import visible

WIDTH = 17  # of the names on the left
MAX_PAIRS = 12  # of one section; all of them with json=true
MAX_VALUE = 36  # characters


def lines_of(a: Path, b: Path, pairs: dict[str, Pairs], drifts: list[Drift]) -> Iterator[str]:
    """Yield what differs, section by section."""
    yield f"{'a':<{WIDTH}}{a}"
    yield f"{'b':<{WIDTH}}{b}"
    for name, of_section in pairs.items():
        yield f"{name:<{WIDTH}}{_counted(len(of_section))}"
        yield from _table(of_section)
    for drift in drifts:
        yield from _drift(drift)


def _counted(count: int) -> str:
    return "equal" if not count else f"{count} differ{'s' if count == 1 else ''}"


def _table(pairs: Pairs) -> Iterator[str]:
    shown = [(key, _said(was), _said(now)) for key, (was, now) in list(pairs.items())[:MAX_PAIRS]]
    widths = [max((len(row[column]) for row in shown), default=0) for column in (0, 1)]
    for key, was, now in shown:
        yield f"  {key:<{widths[0]}}  {was:<{widths[1]}}  {now}"
    if len(pairs) > MAX_PAIRS:
        yield f"  .. and {len(pairs) - MAX_PAIRS} more; see all with json=true"


def _said(value: Any) -> str:
    text = visible(" ".join(str(value).split()))
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 2]}.."


def _drift(drift: Drift) -> Iterator[str]:
    note = f" ({drift.note})" if drift.note else ""
    if not drift.num_common:
        yield f"{drift.name:<{WIDTH}}no common step{note}"
        return
    head = f"{drift.name:<{WIDTH}}"
    if drift.is_equal:
        yield f"{head}equal at all {drift.num_common:,} common steps{note}"
        return
    assert drift.first is not None
    assert drift.last is not None
    count = _counted(drift.num_different)
    yield f"{head}{count} of {drift.num_common:,} common steps{note}"
    rows = [("first", drift.first_step, drift.first), ("end", drift.last_step, drift.last)]
    for name, step, (was, now) in rows:
        far = f"{relative(was, now):.1e} relative"
        yield f"  {name:<8}  step {step:<8}  {was:<18.15g}  {now:<18.15g}  {far}"
    bits = "  ".join(value.hex() for value in drift.first)
    yield f"  {'':<8}  first in bits  {bits}"
    yield f"  {'largest':<8}  step {drift.largest_step:<8}  {drift.largest:.1e} relative"
