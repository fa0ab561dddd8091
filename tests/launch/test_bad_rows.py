"""Rows that a recipe of fine-tuning cannot learn from are refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.exit_codes import BAD_CONFIG, DATA

TEXTS = [{"text": f"text {n}", "label": ("ham", "spam")[n % 2]} for n in range(40)]
WORDS = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}] * 40
NAN = float("nan")


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]


SEQUENCE, TOKEN, SFT = "sequence_classification", "token_classification", "sft"
EVAL, REGRESSION = "data.eval_path={eval}", "data.encoder.problem_type=regression"
NAMES = "data.encoder.labels=[a,b,c]"
# Recipe, rows, words of the command line, rows to evaluate on, exit code, parts of the line.
CASES: dict[str, tuple[str, list[Any], str, list[Any], int, list[str]]] = {
    "number of labels that the model should have": (
        SEQUENCE, TEXTS, "model.num_labels=2", [], BAD_CONFIG, ["unknown key model.num_labels"],
    ),
    "labels that the settings lack": (
        SEQUENCE, TEXTS, "data.encoder.labels=[ham,eggs]", [], DATA,
        ["20 of 40 rows", "label 'spam' is unknown", "Known: ham, eggs", "data.encoder.labels"],
    ),
    "label that only the rows to evaluate on have": (
        SEQUENCE, TEXTS, EVAL, labelled("eggs", "eggs"), DATA,
        ["eval.jsonl: 2 of 2", "label 'eggs' is unknown", "data.encoder.labels"],
    ),
    "tag that only the rows to evaluate on have": (
        TOKEN, WORDS, EVAL, [{"tokens": ["a"], "tags": ["Z"]}] * 2, DATA,
        ["eval.jsonl", "label 'Z' is unknown", "Known: X, Y"],
    ),
    "nothing trains": (
        SEQUENCE, TEXTS, "freeze.frozen=['*']", [], BAD_CONFIG, ["nothing to train", "remove"],
    ),
    "no column of labels": (
        SEQUENCE, [{"text": "a"}] * 4, "", [], BAD_CONFIG,
        ["no column 'label'", "only text", "set data.encoder.label"],
    ),
    "no column of text": (
        SEQUENCE, TEXTS, "data.encoder.text=txt", [], BAD_CONFIG,
        ["no column 'txt'", "did you mean text?", "set data.encoder.text"],
    ),
    "labels that are null": (
        SEQUENCE, labelled(*[None] * 4), NAMES, [], DATA,
        ["4 of 4 rows", "column label is null", "data.encoder.allow_missing"],
    ),
    "labels that are NaN": (
        SEQUENCE, labelled(*[NAN] * 4), NAMES, [], DATA, ["column label is null", "allow_missing"],
    ),
    "labels of which all are NaN": (
        SEQUENCE, labelled(*[NAN] * 4), "", [], BAD_CONFIG, ["'label' holds 0 different labels"],
    ),
    "numbers that are NaN": (
        SEQUENCE, labelled(0.5, *[NAN] * 4), REGRESSION, [], DATA, ["4 of 5", "label is null"],
    ),
    "numbers without end": (
        SEQUENCE, labelled(0.5, *[float("inf")] * 4), REGRESSION, [], DATA,
        ["holds inf, needed a number", "correct the row"],
    ),
    "numbers that are text": (
        SEQUENCE, labelled(*["high"] * 4), REGRESSION, [], DATA,
        ["holds 'high', needed a number", "data.encoder.problem_type"],
    ),
    "numbers that are no regression": (
        SEQUENCE, labelled(0.5, 1.5), "", [], BAD_CONFIG, ["holds 0.5", "problem_type=regression"],
    ),
    "vectors of another length": (
        SEQUENCE, labelled([0, 1], [1, 0]),
        f"{NAMES} data.encoder.problem_type=multi_label_classification", [], DATA,
        ["has 2 numbers, needed 3: one for each of a, b, c"],
    ),
    "texts that are empty": (
        SEQUENCE, [row | {"text": ""} for row in TEXTS], "", [], DATA,
        ["40 of 40 rows", "column text holds no text", "drop the row"],
    ),
    "more words than tags": (
        TOKEN, [*WORDS, *[{"tokens": ["a", "b"], "tags": ["X"]}] * 4], "", [], DATA,
        ["4 of 44 rows", "2 words and 1 tags", "correct the row"],
    ),
    "words that are a text": (
        TOKEN, [{"tokens": "a b", "tags": ["X", "Y"]}], "", [], BAD_CONFIG,
        ["'tokens' holds str, needed a list", "set data.encoder.tokens"],
    ),
    "too few rows to hold one out": (
        SEQUENCE, labelled("a", "b"), "", [], BAD_CONFIG,
        ["none of the data's documents is held out", "data.eval_fraction", "data.eval_path"],
    ),
    "columns of no known shape": (
        SFT, [{"body": "a", "target": "b"}], "", [], BAD_CONFIG,
        ["columns body, target are of no known shape", "set data.encoder.columns"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "rows", "words", "held_out", "code", "fragments"), CASES.values(), ids=CASES
)
def test_bad_rows_are_refused_in_one_line_before_anything_starts(
    recipe: str, rows: list[Any], words: str, held_out: list[Any], code: int,
    fragments: list[str], tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, some in (("rows", rows), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    places = [
        f"data.path={tmp_path}/rows.jsonl",
        f"data.cache={tmp_path}/cache",
        f"runs={tmp_path}/runs",
    ]
    own = words.format(eval=tmp_path / "eval.jsonl").split()
    found = main(
        ["train", f"experiment={recipe}", f"model.path={model_folder}", "data.row_tokens=64",
         *places, *own, "dry_run=true"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert "# checked" not in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("tessera: ")
    for fragment in fragments:
        assert fragment in line
    assert found == code
    assert not (tmp_path / "runs").exists()


def test_bad_row_is_judged_by_no_evaluation(tmp_path: Path, cache: Path) -> None:
    """One of them is within the budget: in training the next row stands in for it, in an evaluation
    that would count twice."""
    from trainer.data.classification import SequenceEncoder
    from trainer.data.document_data import DocumentData
    from trainer.data.tokenizers import ByteTokenizer

    rows = labelled("a", "typo", "b", "a", "b")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DocumentData(
        path=str(path), eval_path=str(path), encoder=SequenceEncoder(labels=("a", "b")),
        row_tokens=16, global_documents=5, cache=str(cache),
    )  # fmt: skip
    loader, held_out = data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    assert held_out is not None
    assert (loader.rows.counts, held_out.rows.counts) == ([5], [4])
    judged = [batch.class_labels for _, batch in held_out.batches()]
    assert sum(int((labels >= 0).sum()) for labels in judged if labels is not None) == 4
