"""The table of docs/models.md: every cell within its limit, and the page holds all of them."""

import re
from pathlib import Path

import pytest

from benchmarks.parity.__main__ import FIRST, LAST
from benchmarks.parity.cells import CELLS
from benchmarks.parity.oracle import specs

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("column", CELLS)
@pytest.mark.parametrize("family", specs())
def test_every_family_agrees_with_transformers(family: str, column: str) -> None:
    measure, limit = CELLS[column]
    assert measure(specs()[family]) <= limit


def test_the_page_holds_every_cell() -> None:
    table = PAGE.read_text().partition(FIRST)[2].partition(LAST)[0]
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table.splitlines() if row}
    for family in specs():
        assert len(rows[family]) == len(CELLS)
        assert all(re.fullmatch(r" \d(e-\d\d)? ", cell) for cell in rows[family])
