"""What questions alone give away: counted from the raw rows, beside what a run says."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.baselines import questions as baseline
from tests.chat_templates import CHATML, assistant, user
from tests.chat_templates import tokenizer as chat_tokenizer
from tests.images import tokenizer, write_pictures, write_rows
from trainer.callbacks.console import ConsoleCallback
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.document_store import DocumentStore
from trainer.data.documents import PackedDocuments
from trainer.data.images.processor import ImageProcessor
from trainer.data.tokenizers import Tokenizer
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import VisionTextData
from trainer.progress import Progress
from trainer.validation import question_only as module
from trainer.validation.question_only import most_frequent, question_only
from trainer.validation.questions import questions_of

COLOURS, SHAPES = ("Red", "blue ", "green"), ("a dot", "a line")


def rows_about(pictures: list[str], count: int) -> list[dict[str, Any]]:
    """Return questions with none, one and two images, whose answers differ in case and spaces."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        colour = COLOURS[(n * n + n // 4) % 3]
        colour = colour.upper() if n % 5 == 0 else colour
        question = (f"what color has {SHAPES[n % 2]}?", f"how many are {n % 7}?")[n % 4 == 3]
        answer = str(n % 3) if n % 4 == 3 else colour
        images = [pictures[(n + k) % len(pictures)] for k in range(n % 3)]
        rows.append({"images": images, "question": question, "answer": answer})
    return rows


def slow_baseline(training: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> float:
    """One question after the other, by lists of answers."""

    def usual(answers: list[str]) -> str:
        return max(answers, key=answers.count)  # the first of equals

    def plain(row: dict[str, Any]) -> str:
        return " ".join(row["answer"].lower().split())

    everything, right = [plain(row) for row in training], 0
    for row in held_out:
        own = [plain(other) for other in training if other["question"] == row["question"]]
        right += usual(own or everything) == plain(row)
    return right / len(held_out)


def said(
    data: DocumentData, tokens: Tokenizer, virtual_ids: tuple[int, ...] = (), **limits: Any
) -> float | None:
    loader, held_out = data.build(
        tokenizer=tokens, seed=0, rank=0, num_ranks=1, virtual_ids=virtual_ids
    )
    assert held_out is not None
    assert isinstance(held_out.rows, PackedDocuments)
    assert isinstance(loader.rows.store, DocumentStore)
    asked = questions_of(held_out.rows, **({"max_documents": None, "room": 300} | limits))
    return question_only(loader.rows.store, asked, tokens, num_virtual=len(virtual_ids))


def places(
    folder: Path, training: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "path": write_rows(folder / "train.jsonl", training),
        "eval_path": write_rows(folder / "test.jsonl", held_out),
        "cache": str(folder / "cache"), "global_documents": 4,
    }  # fmt: skip


def pictured(
    folder: Path, training: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> VisionTextData:
    return VisionTextData(
        **places(folder, training, held_out), encoder=VisionTextEncoder(),
        processor=ImageProcessor(image_size=8), row_tokens=128, row_images=4,
    )  # fmt: skip


def texts(
    folder: Path, training: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> DocumentData:
    return DocumentData(
        **places(folder, training, held_out), encoder=ChatEncoder(), row_tokens=300,
    )  # fmt: skip


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_it_is_what_the_rows_say_whatever_images_stand_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("trainer.data.document_store._BLOCK", block)
    rows = rows_about(write_pictures(tmp_path, 3), 90)
    new = [{"question": "what is new?", "answer": answer} for answer in ("red", "blue")]
    training, held_out = rows[:60], rows[60:] + new
    # What asks nothing, or several things, teaches nothing about questions.
    others = [
        {"text": "a story"}, {"texts": ["a", None, "b"], "images": [None, "images/0.png", None]},
    ]  # fmt: skip
    data = pictured(tmp_path, others + training[:30] + others + training[30:], held_out)
    expected = slow_baseline(training, held_out)
    assert said(data, tokenizer()) == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.9
    files = [write_rows(tmp_path / f"{n}.jsonl", r) for n, r in enumerate((training, held_out))]
    assert f"of each question: accuracy {expected:.4f} of {len(held_out)}" in baseline(*files)[1]


def test_rows_that_are_bad_count_for_nothing(tmp_path: Path) -> None:
    rows = rows_about(write_pictures(tmp_path, 3), 60)
    training, held_out = rows[:40], rows[40:]
    bad = [{"images": ["images/absent.png"], "question": "what color has a dot?", "answer": "no"}]
    found = said(pictured(tmp_path, training[:20] + bad + training[20:], held_out), tokenizer())
    assert found == pytest.approx(slow_baseline(training, held_out), abs=1e-12)


def test_texts_and_conversations_of_one_turn_are_questions_too(tmp_path: Path) -> None:
    rows = rows_about([""], 50)
    training, held_out = rows[:30], rows[30:]
    expected = pytest.approx(slow_baseline(training, held_out), abs=1e-12)

    def pair(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["question"] + " ", "completion": row["answer"]}

    def turn(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [user(row["question"]), assistant(row["answer"])]}

    tokens = chat_tokenizer(tmp_path, CHATML)
    for name, shape in (("pairs", pair), ("turns", turn)):
        (tmp_path / name).mkdir()
        data = texts(tmp_path / name, [*map(shape, training)], [*map(shape, held_out)])
        assert said(data, tokens) == expected
        assert said(data, tokens, virtual_ids=(400, 401)) == expected


def test_it_is_not_said_where_it_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = chat_tokenizer(tmp_path, CHATML)
    turns = [user("A"), assistant("B"), user("C"), assistant("D")]
    pair, story = {"prompt": "a? ", "completion": "b"}, {"text": "a story"}
    cases = [
        ([pair], [{"messages": turns}, pair]),  # several turns
        ([story], [pair]),  # nothing to learn of
    ]
    for number, (training, held_out) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        assert said(texts(tmp_path / str(number), training, held_out), tokens) is None
    (picture,) = write_pictures(tmp_path, 1)
    captions = [{"image": picture, "caption": "a cat"}]
    assert said(pictured(tmp_path, captions, captions), tokenizer()) is None
    monkeypatch.setattr(module, "MAX_DOCUMENTS", 1)
    caplog.set_level(logging.INFO)
    (tmp_path / "many").mkdir()
    data = texts(tmp_path / "many", [pair] * 2, [pair])
    assert said(data, tokens) is None
    assert "2 training documents are more than 1" in caplog.text
    monkeypatch.setattr(module, "MAX_DOCUMENTS", 2)
    assert said(data, tokens) == 1.0
    monkeypatch.setattr(module, "MAX_ANSWERS", 1)
    assert said(data, tokens) == 1.0
    (tmp_path / "different").mkdir()
    data = texts(tmp_path / "different", [pair, pair | {"completion": "c"}], [pair])
    assert said(data, tokens) is None
    assert "different answers in training are more than 1" in caplog.text


def test_the_console_says_it_beside_the_models_number(caplog: pytest.LogCaptureFixture) -> None:
    console, progress = ConsoleCallback(progress_bar=False), Progress(torch.device("cpu"))
    console.max_steps = 9
    numbers = {"loss": 1.5, "num_targets": 7, "anls": 0.25, "num_answers": 3}
    caplog.set_level(logging.INFO)
    console.on_eval(progress, numbers | {"exact_match": 0.8123, "exact_match_question_only": 0.67})
    console.on_eval(progress, numbers | {"exact_match": 0.8123})
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("| anls 0.2500 | exact match 0.8123 (question alone 0.6700)")
    assert second.endswith("| anls 0.2500 | exact match 0.8123")


def test_of_answers_that_are_as_frequent_the_first_counts() -> None:
    pairs = [("a", "x"), ("b", "y"), ("a", " Y"), ("a", "y"), ("b", "x"), ("a", "X  "), ("c", "z")]
    assert most_frequent(pairs) == ({"a": "x", "b": "y", "c": "z"}, "x")
    assert most_frequent([]) == ({}, "")
