"""Classifiers are trained from rows: any ranks and packing, and transformers answers alike."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.data.classification import SequenceEncoder
from trainer.data.document_data import DocumentData
from trainer.data.label_names import label_names
from trainer.data.named_sources import Source
from trainer.data.sources import open_rows
from trainer.data.tagging import TokenEncoder
from trainer.data.tokenizers import ByteTokenizer
from trainer.errors import DataError
from trainer.mesh import MeshSpec
from trainer.record import read_lines
from trainer.settle import settle
from trainer.tasks.causal_lm import CausalLMTask
from trainer.tasks.classification import SequenceClassificationTask, TokenClassificationTask

WORDS = ("red", "green", "a", "longer", "blue", "sky")
TEXTS = [
    {
        "text": " ".join(WORDS[(n * k) % 6] for k in range(1, n % 5 + 2)),
        "mood": ("bad", "good", "so-so")[n % 3],
        "moods": [("bad", "good", "so-so")[k] for k in range(3) if n >> k & 1],
        "score": n / 40,
    }
    for n in range(40)
]
TAGGED = [
    {
        "tokens": row["text"].split(),
        "tags": [("O", "COLOUR")[word in WORDS[:2]] for word in row["text"].split()],
    }
    for row in TEXTS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    for name, rows in (("texts", TEXTS), ("tagged", TAGGED)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def data(folder: Path, encoder: Any, **changes: Any) -> DocumentData:
    name = "tagged" if isinstance(encoder, TokenEncoder) else "texts"
    settings: dict[str, Any] = {
        "path": str(folder / f"{name}.jsonl"), "eval_fraction": 0.2, "row_tokens": 64,
        "global_documents": 8, "micro_rows": 2, "cache": str(folder / "cache"),
    }  # fmt: skip
    return DocumentData(encoder=encoder, **settings | changes)


SEQUENCE, TOKEN = SequenceClassificationTask(), TokenClassificationTask(dropout=0.0)
CASES = {
    "single": (SEQUENCE, SequenceEncoder(label="mood")),
    "multi": (
        SEQUENCE,
        SequenceEncoder(label="moods", problem_type="multi_label_classification"),
    ),
    "regression": (SEQUENCE, SequenceEncoder(label="score", problem_type="regression")),
    "token": (TOKEN, TokenEncoder()),
}


def run_on(folder: Path, case: str, cache: Path, **changes: Any) -> Any:
    task, encoder = CASES[case]
    settings = {"precision": "fp64", "max_steps": 4, "eval_every": 4, "save_every": 4}
    own = {k: changes.pop(k) for k in ("packing", "micro_rows") if k in changes}
    run = tiny_run(cache, **settings | changes)
    return replace(run, task=task, data=data(folder, encoder, **own))


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    lines = read_lines(folder / "metrics.jsonl")
    return [(line["step"], line["split"], line["num_targets"], line["loss"]) for line in lines]


def scores(folder: Path) -> dict[str, float]:
    """Return all that the last evaluation says."""
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert last["split"] == "eval"
    found = {k: v for k, v in last.items() if isinstance(v, float) and k != "time"}
    assert len(found) >= 4
    if "confusion" in last:
        counts = last["confusion"]["rows_are_truth"]
        found |= {f"{i} as {j}": n for i, row in enumerate(counts) for j, n in enumerate(row)}
    return found


@pytest.mark.parametrize("case", list(CASES))
def test_losses_do_not_depend_on_packing_or_ranks(
    folder: Path, tmp_path: Path, cache: Path, case: str
) -> None:
    run_ranks(1, train, tmp_path / "packed", run_on(folder, case, cache))
    run = run_on(folder, case, cache, packing="off", micro_rows=1, mesh=MeshSpec(dp_shard=2))
    run_ranks(2, train, tmp_path / "off", run)
    packed, off = numbers(tmp_path / "packed"), numbers(tmp_path / "off")
    assert [line[:3] for line in off] == [line[:3] for line in packed]
    assert [n[-1] for n in off] == pytest.approx([n[-1] for n in packed], rel=1e-12)
    assert scores(tmp_path / "off") == pytest.approx(scores(tmp_path / "packed"), rel=1e-9)
    targets = {"single": 8, "multi": 24, "regression": 8}
    if case in targets:  # rows, or rows times labels
        assert packed[0][2] == targets[case]


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("single", {"dp_replicate": 2, "cp": 2}),
        ("token", {"cp": 2}),
        ("token", {"tp": 2}),
        ("single", {"pp": 2}),
    ],
)
def test_evaluations_say_the_same_on_ranks_that_share_rows_or_layers(
    folder: Path, tmp_path: Path, cache: Path, case: str, mesh: dict[str, int]
) -> None:
    settings = {"max_steps": 1, "eval_every": 1, "save_every": None}
    run = run_on(folder, case, cache, packing="off", micro_rows=1, **settings)
    run_ranks(1, train, tmp_path / "1", run)
    other = replace(run, mesh=MeshSpec(**mesh))
    run_ranks(math.prod(mesh.values()), train, tmp_path / "n", other)
    assert scores(tmp_path / "n") == pytest.approx(scores(tmp_path / "1"), rel=1e-9)


@pytest.mark.parametrize("case", list(CASES))
def test_transformers_answers_as_the_trained_model_and_with_the_names_of_the_labels(
    folder: Path, tmp_path: Path, cache: Path, case: str
) -> None:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    run = run_on(folder, case, cache)
    run_ranks(1, train, tmp_path / "run", run)
    model_folder = tmp_path / "run" / "checkpoints" / "step_00000004" / "model"
    kind: Any = (
        AutoModelForTokenClassification if case == "token" else AutoModelForSequenceClassification
    )
    theirs = kind.from_pretrained(model_folder).double().eval()
    names = {"regression": ("score",), "token": ("COLOUR", "O")}.get(case, ("bad", "good", "so-so"))
    assert tuple(theirs.config.id2label.values()) == names
    if case != "token":
        assert theirs.config.problem_type == run.data.labels.problem_type
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    _, loader = run.data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    total, count = 0.0, 0
    for _, batch in loader.batches():
        for row in range(batch.num_rows):
            for segment in range(1, int(batch.segment_ids[row].max()) + 1):
                is_in = batch.segment_ids[row] == segment
                text = ByteTokenizer().decode(batch.input_ids[row][is_in].tolist())
                both = tokenizer([text, text + " and more"], padding=True, return_tensors="pt")
                with torch.no_grad():
                    logits = theirs(**both).logits[0]
                if case == "token":
                    labels, logits = batch.labels[row][is_in], logits[: int(is_in.sum())]
                else:
                    labels = batch.class_labels[row, segment - 1]
                total += loss_sum(case, logits, labels)
                count += int((labels != -100).sum())
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["split"], last["num_targets"]) == ("eval", count)
    # transformers computes the rotary tables in fp32.
    assert last["loss"] == pytest.approx(total / count, rel=1e-6)


def loss_sum(case: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the loss by its formula, for one document."""
    if case == "regression":
        return float((logits - labels).square().sum())
    if case == "multi":
        p = logits.sigmoid()
        return float(-(labels * p.log() + (1 - labels) * (1 - p).log()).sum())
    logits, labels = logits.view(-1, logits.shape[-1]), labels.view(-1)
    picked = logits.log_softmax(-1)[labels != -100]
    return -float(picked.gather(1, labels[labels != -100, None]).sum())


def test_labels_are_read_once_and_parquet_files_may_name_them(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(
        {"y": ClassLabel(names=["no", "yes"]), "tags": List(ClassLabel(names=["O", "B"])),
         "n": Value("int64")}
    )  # fmt: skip
    rows = [{"y": 1, "tags": [0, 1], "n": 3}, {"y": 1, "tags": [0], "n": 20}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows, features=features).to_parquet(path)
    source = open_rows(Source(path=str(path)))
    assert label_names([source], "y", cache=tmp_path) == ("no", "yes")
    assert label_names([source], "tags", cache=tmp_path) == ("O", "B")
    assert label_names([source], "n", cache=tmp_path) == ("3", "20")
    source.rows = None  # type: ignore[method-assign, assignment]  read no more
    assert label_names([source], "n", cache=tmp_path) == ("3", "20")


def test_a_task_is_refused_on_data_of_another_kind(folder: Path, cache: Path) -> None:
    for case, task, message in (
        ("single", CausalLMTask(), r"labels \(bad, good, so-so, ..\); set task=sequence_class"),
        ("single", TOKEN, "for every word, and the data has one for every text; set data=token"),
        ("token", SEQUENCE, "for every text, and the data has one for every word; set data=seq"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(run_on(folder, case, cache), task=task).check(1)
    with pytest.raises(ValueError, match="and the data has none; set data=sequence_labels"):
        replace(tiny_run(cache), task=SEQUENCE).check(1)


def test_data_without_labels_is_refused(folder: Path, tmp_path: Path, cache: Path) -> None:
    run = run_on(folder, "single", cache)
    for label, message in (("modo", "no column 'modo'.* did you mean mood"),):
        other = replace(run, data=data(folder, SequenceEncoder(label=label)))
        with pytest.raises(ValueError, match=message):
            other.check(1)
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3)
    one = replace(
        run, data=replace(data(folder, SequenceEncoder()), path=str(tmp_path / "one.jsonl"))
    )
    with pytest.raises(ValueError, match="column 'label' holds 1 different labels; needed 2"):
        one.check(1)


@pytest.mark.parametrize("case", ["single", "token"])
def test_balanced_weights_are_those_of_scikit_learn_over_the_training_documents(
    folder: Path, tmp_path: Path, cache: Path, case: str
) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    task = replace(CASES[case][0], class_weights="balanced")
    run = replace(run_on(folder, case, cache), task=task)
    loader, held_out = run.data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    assert held_out is not None
    store: Any = loader.rows.store
    examples = [store.example(number) for number in range(store.num_documents)]
    of_all = np.concatenate(
        [np.ravel(e.classes if case == "single" else e.labels) for e in examples]
    )
    classes = np.arange(len(run.data.labels.names))
    expected = compute_class_weight("balanced", classes=classes, y=of_all[of_all != -100])
    weights = settle(run).task.class_weights
    assert tuple(weights) == run.data.labels.names
    assert list(weights.values()) == pytest.approx(expected.tolist(), rel=1e-12)
    if case == "single":  # trained with them, as if they were given, on any ranks
        run_ranks(2, train, tmp_path / "balanced", run)
        given = replace(run, task=replace(task, class_weights=weights))
        run_ranks(1, train, tmp_path / "given", given)
        pairs = zip(numbers(tmp_path / "balanced"), numbers(tmp_path / "given"), strict=True)
        for balanced, by_name in pairs:
            assert balanced[:-1] == by_name[:-1]
            assert balanced[-1] == pytest.approx(by_name[-1], rel=1e-12)


def test_balanced_weights_count_a_source_as_often_as_it_is_trained_on(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    for name, labels in (("a", "xxy"), ("b", "yyyyx")):
        lines = [json.dumps({"text": f"{n}", "label": label}) for n, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = {"a": Source(path=str(tmp_path / "a.jsonl"), epochs=3.0)}
    sources["b"] = Source(path=str(tmp_path / "b.jsonl"))
    changes: dict[str, Any] = {"path": None, "sources": sources, "eval_fraction": 0.0}
    mixed = data(folder, SequenceEncoder(), **changes, global_documents=14)
    run = replace(
        run_on(folder, "single", cache, eval_every=None), data=mixed,
        task=SequenceClassificationTask(class_weights="balanced"),
    )  # fmt: skip
    weights = settle(run).task.class_weights
    assert weights == pytest.approx({"x": 14 / (2 * 7), "y": 14 / (2 * 7)}, rel=1e-12)


def test_balanced_weights_without_a_meaning_are_refused(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    task = SequenceClassificationTask(class_weights="balanced")
    for case, message in (("multi", "exclude each other"), ("regression", "no effect on numbers")):
        with pytest.raises(ValueError, match=message):
            replace(run_on(folder, case, cache), task=task).check(1)
    names = ("bad", "good", "so-so", "never")
    run = replace(
        run_on(folder, "single", cache), task=task,
        data=data(folder, SequenceEncoder(label="mood", labels=names)),
    )  # fmt: skip
    with pytest.raises(DataError, match="label 'never' is of no training document"):
        settle(run)


def test_weights_of_classes_are_the_same_on_any_ranks_and_bad_ones_are_refused(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    task = SequenceClassificationTask(class_weights={"good": 4.0}, label_smoothing=0.1)
    run = replace(run_on(folder, "single", cache), task=task)
    run_ranks(1, train, tmp_path / "1", run)
    run_ranks(2, train, tmp_path / "2", replace(run, mesh=MeshSpec(dp_replicate=2)))
    run_ranks(1, train, tmp_path / "plain", run_on(folder, "single", cache))
    one, two, plain = (numbers(tmp_path / name) for name in ("1", "2", "plain"))
    assert [n[-1] for n in two] == pytest.approx([n[-1] for n in one], rel=1e-12)
    assert one[0][-1] == plain[0][-1]  # before the first update: what is logged is plain
    assert one[-1][-1] != plain[-1][-1]
    for settings, message in (
        ({"class_weights": {"godo": 2.0}}, "class_weights.godo is no label; did you mean good"),
        ({"class_weights": {"good": 0.0}}, "class_weights.good=0.0 is no positive"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 is no share"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(run, task=SequenceClassificationTask(**settings)).check(1)
    numbers_run = run_on(folder, "regression", cache)
    with pytest.raises(ValueError, match="have no effect on numbers"):
        replace(numbers_run, task=SequenceClassificationTask(label_smoothing=0.1)).check(1)
