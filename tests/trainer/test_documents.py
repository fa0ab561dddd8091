"""Fine-tuning data: documents packed within a step, whatever ranks, packing and bad rows do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.nn.head import IGNORED
from tests.distributed.test_layouts import curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.data.bad_rows import FILE
from trainer.data.bpe import train_bpe
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.loader import StepLoader
from trainer.data.preferences import PreferenceEncoder
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer
from trainer.distributed import Placement
from trainer.errors import DataError
from trainer.mesh import MeshSpec
from trainer.record import read_lines

ROWS = [{"prompt": f"what is {n}? ", "completion": "so " * (n % 7 + 1) + str(n)} for n in range(60)]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DocumentData:
    folder = tmp_path_factory.mktemp("documents")
    return DocumentData(
        path=written(folder / "rows.jsonl", ROWS), encoder=ChatEncoder(), eval_fraction=0.1,
        row_tokens=64, global_documents=12, micro_rows=2, cache=str(folder / "cache"),
    )  # fmt: skip


def loader_of(data: DocumentData, rank: int = 0, num_ranks: int = 1) -> StepLoader:
    return data.build(tokenizer=ByteTokenizer(), seed=3, rank=rank, num_ranks=num_ranks)[0]


def documents_of(loader: StepLoader, step: int) -> list[tuple[bytes, bytes]]:
    """Return ids and labels of every document that a rank has in a step."""
    found = []
    for batch in loader.step(step).micro_batches:
        for row in range(batch.num_rows):
            segments = batch.segment_ids[row]
            for segment in range(1, int(segments.max()) + 1):
                is_in = segments == segment
                positions = batch.position_ids[row][is_in].tolist()
                assert positions == list(range(len(positions)))
                ids, labels = batch.input_ids[row][is_in], batch.labels[row][is_in]
                found.append((ids.numpy().tobytes(), labels.numpy().tobytes()))
            assert (batch.labels[row][segments == 0] == IGNORED).all()
    return sorted(found)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 20), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["best_fit", "off"])
)
def test_a_step_holds_the_same_documents_on_any_ranks_with_and_without_packing(
    data: DocumentData, step: int, num_ranks: int, micro_rows: int, packing: Any
) -> None:
    expected = documents_of(loader_of(replace(data, packing="off")), step)
    assert len(expected) == 12
    other = replace(data, packing=packing, micro_rows=micro_rows)
    loaders = [loader_of(other, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(d for loader in loaders for d in documents_of(loader, step)) == expected
    steps = [loader.step(step) for loader in loaders]
    assert len({len(one.micro_batches) for one in steps}) == 1
    samples = [n for one in steps for first, last in one.ranges for n in range(first, last)]
    assert sorted(samples) == list(range(12 * step, 12 * step + 12))


def test_the_completion_and_its_end_are_trained_and_nothing_else(data: DocumentData) -> None:
    tokenizer = ByteTokenizer()
    for ids, labels in documents_of(loader_of(data), 0):
        targets = np.frombuffer(labels, np.int64)
        trained = targets[targets != IGNORED].tolist()
        text = tokenizer.decode(np.frombuffer(ids, np.int64).tolist())
        assert tokenizer.decode(trained) == text.partition("? ")[2]
        assert trained[-1] == tokenizer.eos_token_id


def run_on(data: DocumentData, cache: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"precision": "fp64", "max_steps": 4, "eval_every": 2} | changes
    return replace(tiny_run(cache, **settings), data=data)


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    lines = read_lines(folder / "metrics.jsonl")
    return [(line["split"], line["step"], line["loss"], line["num_targets"]) for line in lines]


def test_losses_are_the_same_with_and_without_packing_and_after_a_change_of_ranks(
    tmp_path: Path, cache: Path, data: DocumentData
) -> None:
    run_ranks(1, train, tmp_path / "packed", run_on(data, cache))
    off = replace(data, packing="off", micro_rows=3)
    run_ranks(
        2, train, tmp_path / "off", run_on(off, cache, mesh=MeshSpec(dp_shard=2), max_steps=2)
    )
    run_ranks(1, train, tmp_path / "off", run_on(off, cache))
    expected, found = numbers(tmp_path / "packed"), numbers(tmp_path / "off")
    assert len(expected) == 6
    assert [line[:2] + line[3:] for line in found] == [line[:2] + line[3:] for line in expected]
    assert [n[2] for n in found] == pytest.approx([n[2] for n in expected], rel=1e-12, abs=0)


def test_topology_free_runs_on_documents_are_equal_in_every_bit(
    tmp_path: Path, cache: Path, data: DocumentData
) -> None:
    run = run_on(data, cache, precision="fp32", deterministic="topology_free")
    for ranks, mesh in ((1, MeshSpec()), (2, MeshSpec(dp_shard=2)), (4, MeshSpec(dp_replicate=4))):
        run_ranks(ranks, train, tmp_path / str(ranks), replace(run, mesh=mesh))
    for ranks in (2, 4):
        assert numbers(tmp_path / str(ranks)) == numbers(tmp_path / "1")
        assert curve(tmp_path / str(ranks), "grad_norm") == curve(tmp_path / "1", "grad_norm")


def with_bad(bad: set[int]) -> list[dict[str, Any]]:
    return [{**row, "completion": ""} if n in bad else row for n, row in enumerate(ROWS)]


def test_a_bad_row_is_replaced_by_the_next_good_one_and_shifts_nothing(
    tmp_path: Path, data: DocumentData
) -> None:
    whole = replace(data, eval_fraction=0.0)
    broken = replace(whole, path=written(tmp_path / "bad.jsonl", with_bad({7})),
                     cache=str(tmp_path / "cache"))  # fmt: skip
    before = [documents_of(loader_of(whole), step) for step in range(5)]
    after = [documents_of(loader_of(broken), step) for step in range(5)]
    pairs = [(set(old), set(new)) for old, new in zip(before, after, strict=True)]
    changed = [(old - new, new - old) for old, new in pairs if old != new]
    assert len(changed) == 1  # an epoch of 60 rows shows row 7 once
    (gone,), new = changed[0]
    assert b"7?" in bytes(np.frombuffer(gone[0], np.int64).astype(np.uint8))
    assert len(new) <= 1  # the next row, unless it stood in the same step already
    (log,) = (tmp_path / "cache").rglob(FILE)
    assert json.loads(log.read_text())["row"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, p: replace(d, path=written(p, with_bad({3, 4, 9}))),
         r"3 of 60 rows are bad \(allowed: 0.1%, 100 in a row\); the last, row 9: the completion"),
        (lambda d, p: replace(d, path=written(p, with_bad(set(range(60))) * 2)),
         r"100 rows in a row, the last 99, are bad"),
        (lambda d, p: replace(d, row_tokens=20),
         r"documents \(train\) are longer than data.row_tokens=20, the longest has \d+; raise"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_ends_the_run(
    tmp_path: Path, data: DocumentData, change: Callable[..., DocumentData], message: str
) -> None:
    wrong = change(replace(data, cache=str(tmp_path / "cache")), tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=message):
        loader_of(wrong)


def test_long_documents_are_cut_when_that_was_asked_for(data: DocumentData) -> None:
    loader = loader_of(replace(data, row_tokens=20, too_long="cut"))
    lengths = [len(ids) // 8 for ids, _ in documents_of(loader, 0)]
    assert len(lengths) == 12
    assert max(lengths) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, p: replace(d, path="stdlib"), r"data.path=stdlib holds no rows"),
        (lambda d, p: replace(d, path=written(p, [])), r"holds empty files only; give one"),
        (lambda d, p: replace(d, path=written(p, [{"promt": "a", "completion": "b"}])),
         r"the nearest is prompt \+ completion"),
        (lambda d, p: replace(d, global_documents=0), r"data.global_documents=0 is not positive"),
        (lambda d, p: replace(d, eval_fraction=1.0), r"data.eval_fraction=1.0 is no share"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, data: DocumentData, change: Callable[..., DocumentData], message: str
) -> None:
    with pytest.raises((ValueError, DataError), match=message):
        change(data, tmp_path / "rows.jsonl").check()


def test_a_tokenizer_without_what_rows_need_is_refused_before_anything_starts(
    tmp_path: Path, data: DocumentData
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = replace(data, path=written(tmp_path / "chat.jsonl", [{"messages": turns}]))
    ByteTokenizer(chat_template="{% if %}").save(tmp_path)
    run = replace(tiny_run(tmp_path / "cache"), data=chat)
    for setting, message in (
        ("byte", "the tokenizer has no chat template, which conversations need; put a"),
        (str(tmp_path), "line 1 of the chat template is no Jinja: .*; correct chat_template"),
        ("bpe", "the tokenizer has no chat template, which conversations need; put a"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(run, tokenizer=setting).check(1)


def test_a_bpe_is_trained_on_what_the_documents_say_once(
    tmp_path: Path, data: DocumentData
) -> None:
    path = written(tmp_path / "rows.jsonl", with_bad({3}))
    fresh = replace(data, path=path, cache=str(tmp_path / "cache"))
    good = [row["prompt"] + row["completion"] for number, row in enumerate(ROWS) if number != 3]
    train_bpe(tmp_path / "expected", good, 280)
    found = fresh.tokenizer("bpe", 280)
    assert found.fingerprint == FileTokenizer(tmp_path / "expected").fingerprint
    assert 258 < found.vocab_size <= 280
    again = replace(fresh)
    with patch("trainer.data.bpe.train_bpe", side_effect=AssertionError):
        assert again.tokenizer("bpe", 280).fingerprint == found.fingerprint
    assert fresh.tokenizer("bpe", 270).fingerprint != found.fingerprint


def test_a_bpe_is_trained_on_whole_texts_of_pairs(tmp_path: Path, data: DocumentData) -> None:
    pair = {"prompt": "what is this? ", "chosen": "a square", "rejected": "a round square"}
    path = written(tmp_path / "pairs.jsonl", [pair] * 4)
    encoder = PreferenceEncoder(max_tokens=4)  # of a bpe, not of bytes
    pairs = replace(data, path=path, encoder=encoder, cache=str(tmp_path / "cache"))
    assert len(pairs.tokenizer("bpe", 300).encode("a round square")) == 3


def test_a_bad_first_row_is_left_to_the_budget(tmp_path: Path, data: DocumentData) -> None:
    path = written(tmp_path / "rows.jsonl", with_bad({0}))
    replace(tiny_run(tmp_path / "cache"), data=replace(data, path=path)).check(1)


def train_on_own(placement: Placement, folder: Path, run: Any) -> bool:
    """Train on a file that differs from rank to rank, as on nodes that were not kept alike."""
    path = written(folder / f"{placement.rank}.jsonl", ROWS[placement.rank :])
    return train(placement, folder / "run", replace(run, data=replace(run.data, path=path)))


def test_ranks_that_read_other_data_are_refused(
    tmp_path: Path, cache: Path, data: DocumentData
) -> None:
    run = run_on(data, cache, mesh=MeshSpec(dp_shard=2))
    with pytest.raises(Exception, match=r"DataError: rank 1 reads other data .* than rank 0"):
        run_ranks(2, train_on_own, tmp_path, run)
