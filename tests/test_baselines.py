"""Baselines that are printed beside what was trained, against answers counted by hand."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.baselines import main
from tests.images import write_rows


def rows(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"question": question, "answer": answer} for question, answer in pairs]


def test_each_question_gets_its_most_frequent_answer_and_a_new_one_that_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = [("what color?", "blue"), ("what color?", "blue"), ("what color?", "red")]
    known = rows(*colours, ("a circle?", "yes"), ("a square?", "yes"), ("a line?", "yes"))
    new = rows(("what color?", "blue"), ("what color?", "red"), ("a dot?", "yes"),
               ("a line?", "no"), ("a circle?", "yes"))  # fmt: skip
    files = [write_rows(tmp_path / name, part) for name, part in (("a", known), ("b", new))]
    assert main(["questions", f"train={files[0]}", f"test={files[1]}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "most frequent answer (yes): accuracy 0.4000",
        "most frequent answer of each question: accuracy 0.6000 of 5 questions, 4 of them known",
    ]
