"""Figures of acceptance tests become lines of a file, and a table of a page."""

from pathlib import Path

import pytest

from tests.conftest import Figure
from tests.faults.figures import BEGIN, END, write_page
from trainer.record import read_lines


@pytest.fixture
def figures_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_FIGURES", str(tmp_path / "figures.jsonl"))
    return tmp_path / "figures.jsonl"


def test_recorded_figures_name_their_test(figures_file: Path, figure: Figure) -> None:
    figure("A1 kills", 100, "")
    (line,) = read_lines(figures_file)
    assert (line["name"], line["value"]) == ("A1 kills", 100)
    assert line["test"] == "tests/test_figures.py::test_recorded_figures_name_their_test"


def test_page_gets_the_newest_figure_of_each_name_in_order(
    figures_file: Path, figure: Figure
) -> None:
    for name, value, unit in (
        ("A12 found after", 9.5, "s"), ("A1 kills", 10, ""), ("A12 found after", 4.25, "s"),
    ):  # fmt: skip
        figure(name, value, unit)
    page = figures_file.with_name("page.md")
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write_page(figures_file, page)
    lines = page.read_text().splitlines()
    assert [lines[0], lines[-1]] == ["above", "below"]
    assert [line.split(" | ")[:2] for line in lines if "|" in line][2:] == [
        ["| A1 kills", "10 "], ["| A12 found after", "4.25 s"],
    ]  # fmt: skip


def test_page_without_marks_is_refused(figures_file: Path, figure: Figure) -> None:
    figure("A1 kills", 100, "")
    page = figures_file.with_name("page.md")
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match=r"page.md lacks the lines .*; put them where"):
        write_page(figures_file, page)
