"""Validation: which questions are asked, the same answers whatever ranks and batches, one page."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.parity.oracle import specs
from launch.report.history import read_history
from launch.report.write import report_page
from models.nn.head import IGNORED
from tests.chat_templates import CHATML, assistant, system, tokenizer, user
from tests.images import mixed_data, picture
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from tests.trainer.test_documents import written
from trainer.batch import Batch
from trainer.best import BestSpec
from trainer.checkpoint.commit import committed_steps
from trainer.construct import build_engine
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.documents import PackedDocuments
from trainer.data.tokenizers import ByteTokenizer, Tokenizer
from trainer.data.vision_text_data import VisionTextData
from trainer.distributed import Placement, Ranks
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.judges import answer_judge
from trainer.mesh import MeshSpec
from trainer.notes import ANSWERS, read_note
from trainer.protocols import Engine
from trainer.record import read_lines
from trainer.run import Run
from trainer.run_data import build_data
from trainer.validation.page import Shown, answers_page
from trainer.validation.questions import Question, drawn, questions_of
from trainer.validation.spec import ValidationSpec
from trainer.validation.validator import Validator

NEW = 6
SPEC = replace(specs()["Idefics"], vocab_size=258, initializer_range=0.3)
PAIRS = [
    {"prompt": f"is {n} odd? ", "completion": "yes" if n % 2 else "not at all"} for n in range(60)
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> VisionTextData:
    """Rows of no, one and several images; 20 of 60 are held out."""
    folder = tmp_path_factory.mktemp("vision")
    return mixed_data(folder, SPEC.vision_config.image_size, eval_fraction=0.3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DocumentData:
    folder = tmp_path_factory.mktemp("texts")
    return DocumentData(
        path=written(folder / "rows.jsonl", PAIRS), encoder=ChatEncoder(), eval_fraction=0.3,
        row_tokens=64, global_documents=12, micro_rows=6, cache=str(folder / "cache"),
    )  # fmt: skip


def run_on(data: DocumentData, cache: Path, **changes: Any) -> Run:
    asks = ValidationSpec(every=1, max_new_tokens=NEW, batch_documents=3)
    settings: dict[str, Any] = {"precision": "fp64", "eval_every": 2, "validation": asks}
    run = tiny_run(cache, **(settings | changes))
    return replace(run, data=data, model=changes.get("model", run.model))


def judge(placement: Placement, run: Run) -> tuple[Ranks, Engine, Validator]:
    ranks = Ranks(placement, run.timeout_seconds)
    mesh = run.chosen_mesh(placement.world_size)[0].build(ranks=ranks)
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    tokens, training, loader = build_data(run, ranks, mesh)
    validator = answer_judge(
        run, loader, mesh, ranks.device, training=training.rows.store, tokenizer=tokens, page=None
    )
    assert validator is not None
    return ranks, engine, validator


def answered(placement: Placement, run: Run) -> list[list[int]]:
    ranks, engine, validator = judge(placement, run)
    found = validator.answers(engine)
    ranks.close()
    return found


def slowly_answered(placement: Placement, run: Run) -> list[list[int]]:
    """One question after the other, no padding, no cache, every pass over everything."""
    ranks, engine, validator = judge(placement, run)
    found = []
    for question in validator.questions:
        ids = list(question.prompt)
        while len(ids) < len(question.prompt) + NEW:
            row = torch.tensor([ids])
            batch = Batch(
                input_ids=row, labels=torch.full_like(row, IGNORED), provenance=(),
                position_ids=torch.arange(len(ids))[None], segment_ids=torch.ones_like(row),
            )  # fmt: skip
            document = question.document
            batch = validator.rows.with_images(batch, [[document]], [document])
            ids.append(int(engine.logits(batch)[0, -1].argmax()))
            if ids[-1] in validator.stop_token_ids:
                ids.pop()
                break
        found.append(ids[len(question.prompt) :])
    ranks.close()
    return found


@pytest.fixture(scope="module")
def reference(pictures: VisionTextData, cache: Path) -> list[list[int]]:
    (found,) = run_ranks(1, slowly_answered, run_on(pictures, cache, model=SPEC))
    assert len(found) > 12
    assert len(set(map(tuple, found))) > len(found) // 2  # they say something of the question
    return found


SHARDED = {
    "one process": (1, MeshSpec(), NativeEngine()),
    "fsdp": (2, MeshSpec(dp_shard=2), NativeEngine()),
    "ddp": (2, MeshSpec(dp_replicate=2), NativeEngine()),
}
OTHERS = {
    "tp": (2, MeshSpec(tp=2), NativeEngine()),
    "cp": (2, MeshSpec(cp=2), NativeEngine()),
    "pp": (2, MeshSpec(pp=2), NativeEngine()),
    "zero 3": (2, MeshSpec(dp_replicate=2), DeepSpeedEngine(stage=3)),
}


@pytest.mark.parametrize(
    ("ranks", "mesh", "engine"),
    [pytest.param(*case, id=name) for name, case in SHARDED.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in OTHERS.items()],
)
def test_answers_are_those_of_a_slow_loop_on_every_layout(
    pictures: VisionTextData, cache: Path, reference: list[list[int]],
    ranks: int, mesh: MeshSpec, engine: Any,
) -> None:  # fmt: skip
    precision = "fp32" if isinstance(engine, DeepSpeedEngine) else "fp64"
    run = run_on(pictures, cache, model=SPEC, mesh=mesh, engine=engine, precision=precision)
    assert run_ranks(ranks, answered, run) == [reference] * ranks


@pytest.mark.parametrize("size", [1, 64])
def test_answers_do_not_depend_on_how_many_are_written_together(
    pictures: VisionTextData, cache: Path, reference: list[list[int]], size: int
) -> None:
    run = run_on(pictures, cache, model=SPEC)
    run = replace(run, validation=replace(run.validation, batch_documents=size))
    assert run_ranks(1, answered, run) == [reference]


def test_what_a_run_says_of_its_answers_is_the_same_on_other_ranks(
    tmp_path: Path, texts: DocumentData, cache: Path
) -> None:
    """It learns to answer, so that answers end at different tokens."""
    settings: dict[str, Any] = {
        "max_steps": 50, "eval_every": 10, "log_every": 50,
        "best": BestSpec(metric="exact_match"),
        "validation": ValidationSpec(every=2, max_new_tokens=16, batch_documents=3, samples=5),
    }  # fmt: skip
    for ranks, mesh in ((1, MeshSpec()), (2, MeshSpec(dp_shard=2))):
        run = run_on(texts, cache, mesh=mesh, **settings)
        run_ranks(ranks, train, tmp_path / str(ranks), run)
    lines = [
        [line for line in read_lines(tmp_path / name / "metrics.jsonl") if line["split"] == "eval"]
        for name in ("1", "2")
    ]
    names = ("step", "exact_match", "exact_match_question_only", "anls", "num_answers")
    numbers = [[[line.get(name) for name in names] for line in own] for own in lines]
    assert numbers[0] == numbers[1]
    alone = {line["exact_match_question_only"] for line in lines[0] if "exact_match" in line}
    assert len(alone) == 1
    assert 0.2 < alone.pop() < 0.8  # of yes and not at all
    by_step = {line["step"]: line.get("exact_match") for line in lines[0]}
    assert [step for step, value in by_step.items() if value is not None] == [20, 40, 50]
    assert max(by_step[step] for step in (20, 40, 50)) > 0.2
    best = max((20, 40, 50), key=lambda step: (by_step[step], -step))
    checkpoints = tmp_path / "1" / "checkpoints"
    assert (checkpoints / "best").read_text() == f"step_{best:08d}\n"
    assert best in committed_steps(checkpoints)
    html = (tmp_path / "2" / "validation.html").read_text()
    assert "Answers: step 50" in html
    assert html.count("<section") == 5
    assert "odd?" in html
    assert "<dt>exact_match_question_only</dt>" in html
    assert len(read_note(tmp_path / "2", ANSWERS)["shown"]) == 5
    assert report_page(read_history(tmp_path / "2")).count('<div class="card ') == 5


def test_the_last_evaluation_has_answers_though_patience_ran_out_before(
    tmp_path: Path, texts: DocumentData, cache: Path
) -> None:
    worse = BestSpec(metric="loss", goal="max", patience=1)
    run = run_on(texts, cache, max_steps=40, best=worse)
    run = replace(run, validation=replace(run.validation, every=9))
    run_ranks(1, train, tmp_path / "run", run)
    lines = [x for x in read_lines(tmp_path / "run" / "metrics.jsonl") if x["split"] == "eval"]
    assert ["exact_match" in line for line in lines] == [False, True]


def rows_of(
    folder: Path, rows: list[dict[str, Any]], tokens: Tokenizer, virtual_ids: tuple[int, ...] = ()
) -> PackedDocuments:
    data = DocumentData(
        path=written(folder / "rows.jsonl", rows), eval_path=written(folder / "eval.jsonl", rows),
        encoder=ChatEncoder(), row_tokens=200, global_documents=2, cache=str(folder / "cache"),
    )  # fmt: skip
    loader = data.build_eval(tokenizer=tokens, virtual_ids=virtual_ids)
    assert loader is not None
    assert isinstance(loader.rows, PackedDocuments)
    return loader.rows


def asked(rows: PackedDocuments, **limits: Any) -> tuple[Question, ...]:
    return questions_of(rows, **({"max_documents": None, "room": 200} | limits))


def test_what_stands_before_learnt_tokens_is_asked_and_nothing_else(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path, CHATML)
    rows = rows_of(
        tmp_path,
        [
            {"messages": [system("S"), user("A"), assistant("B"), user("C"), assistant("D")]},
            {"prompt": "what? ", "completion": "that"},
            {"text": "a story that asks nothing"},
        ],
        tokens,
    )

    def text(ids: list[int]) -> str:
        return str(tokens._fast.decode(ids, skip_special_tokens=False))

    found = [(text(one.prompt), text(one.reference)) for one in asked(rows)]
    first = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
    )
    second = f"{first}B<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    assert [pair for pair in found if "im_start" in pair[0]] == [
        (first, "B<|im_end|>"), (second, "D<|im_end|>"),
    ]  # fmt: skip
    assert len(found) == 3
    (pair,) = (pair for pair in found if "im_start" not in pair[0])
    assert pair[0].endswith("what? ")
    assert pair[1].startswith("that")


def test_virtual_tokens_stand_before_questions_and_ask_nothing_themselves(tmp_path: Path) -> None:
    tokens = ByteTokenizer()
    pairs = [{"prompt": "a?", "completion": "b"}, {"text": "a story"}]
    (question,) = asked(rows_of(tmp_path, pairs, tokens, (300, 301)))
    assert question.prompt == [300, 301, tokens.bos_token_id, *b"a?"]
    assert question.reference == [*b"b", tokens.eos_token_id]


def test_some_documents_are_drawn_whatever_takes_turns_in_their_order() -> None:
    some, more = drawn(1000, 250), drawn(1000, 500)
    assert some == sorted(set(some)) == drawn(1000, 250)
    assert len(some) == 250
    assert set(some) < set(more)
    for period in (2, 4, 5):
        counts = np.bincount(np.array(more) % period)
        assert abs(counts - 500 / period).max() < 50  # 50: about 4 standard deviations
    assert drawn(3, 3) == drawn(3, 9) == drawn(3, None) == [0, 1, 2]


def test_questions_without_room_for_an_answer_are_counted_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [{"prompt": "why? " * n, "completion": "so"} for n in (1, 2, 9)]
    rows = rows_of(tmp_path, pairs, ByteTokenizer())
    assert sorted(len(one.prompt) for one in asked(rows, room=12)) == [6, 11]  # BOS, 5 a word
    assert "1 of 3 questions have more than 12 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"found 3 questions, all too long, in 3 held-out"):
        asked(rows, room=3)
    stories = rows_of(tmp_path, [{"text": "one"}, {"text": "two"}], ByteTokenizer())
    with pytest.raises(ValueError, match=r"found no question, in 2 held-out documents; give rows"):
        asked(stories)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"eval_every": None}, r"validation.every=1 counts evaluations, and there are none; set"),
        ({"data": None}, r"needs documents that ask and answer in words; set data=chat"),
        ({"metrics": ("exact",)}, r"has 'exact', which is unknown; take some of exact_match"),
    ],
)
def test_validation_that_cannot_be_is_refused_before_anything_starts(
    texts: DocumentData, cache: Path, changes: dict[str, Any], reason: str
) -> None:
    run = run_on(texts, cache, eval_every=changes.get("eval_every", 2))
    asks = replace(run.validation, metrics=changes.get("metrics", ("anls",)))
    data = changes.get("data", texts) or tiny_run(cache, data_eval_fraction=0.1).data
    with pytest.raises(ValueError, match=reason):
        replace(run, validation=asks, data=data).check(1)


@pytest.mark.parametrize("name", ["every", "max_documents", "max_new_tokens", "batch_documents"])
def test_a_number_that_is_not_positive_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"validation.{name}=0 is not positive; set it to 1"):
        ValidationSpec(**{name: 0})


def test_the_page_needs_nothing_else_and_shows_texts_as_they_are() -> None:
    shown = Shown(
        source="rows[3:4]", question="<script>alert(1)</script> $title?",
        pictures=(picture(1), picture(2, (900, 30))), reference="Yes", answer=' yes"<b>',
    )  # fmt: skip
    answers = [shown, replace(shown, answer="yes")]
    html = answers_page("Answers: <run>", {"exact_match": "0.5000"}, answers)
    assert "Answers: &lt;run&gt;" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $title?" in html
    assert "<script" not in html
    assert "://" not in html
    assert "default-src 'none'; img-src data:;" in html  # a browser would load nothing either
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 4
    data = base64.b64decode(sources[0].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture(1)))
    assert re.findall(r'<section class="(\w+)"', html) == ["wrong", "right"]
