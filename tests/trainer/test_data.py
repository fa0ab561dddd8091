"""From text to steps: borders, targets, order, elasticity, sources."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.nn.head import IGNORED
from tests.token_folders import store_of
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.order import permute, round_keys
from trainer.data.pretraining import PretrainingData
from trainer.data.rows import PackedRows
from trainer.data.sources import open_texts
from trainer.data.tokenise import eval_rank
from trainer.data.tokenizers import ByteTokenizer
from trainer.errors import DataError


def reference_rows(
    lengths: list[int], row_tokens: int, shard_tokens: int
) -> list[dict[str, list[int]]]:
    """Cut the rows token by token: slow and obvious."""
    rows, stream = [], []  # the stream of a shard: (token, document)
    for k, length in enumerate(lengths):
        stream += [(token, k) for token in [256, *([k % 100] * length), 257]]
        if len(stream) >= shard_tokens or k == len(lengths) - 1:
            rows += rows_of_stream(stream, row_tokens)
            stream = []
    return rows


def rows_of_stream(stream: list[tuple[int, int]], row_tokens: int) -> list[dict[str, list[int]]]:
    rows = []
    for start in range(0, len(stream), row_tokens):
        part = stream[start : start + row_tokens]
        row: dict[str, list[int]] = {
            "input_ids": [], "labels": [], "position_ids": [], "segment_ids": [],
        }  # fmt: skip
        for place, (token, document) in enumerate(part):
            is_new = place == 0 or part[place - 1][1] != document
            following = stream[start + place + 1] if start + place + 1 < len(stream) else None
            same = following is not None and following[1] == document
            row["input_ids"].append(token)
            row["labels"].append(following[0] if same and following else IGNORED)
            row["position_ids"].append(0 if is_new else row["position_ids"][-1] + 1)
            previous = row["segment_ids"][-1] if row["segment_ids"] else 0
            row["segment_ids"].append(previous + 1 if is_new else previous)
        padding = row_tokens - len(part)
        row["labels"] += [IGNORED] * padding
        for name in ("input_ids", "position_ids", "segment_ids"):
            row[name] += [0] * padding
        rows.append(row)
    return rows


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    row_tokens=st.integers(1, 17),
    shard_tokens=st.sampled_from([1, 10, 30, 1000]),
)
def test_rows_equal_a_cut_made_token_by_token(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    row_tokens: int,
    shard_tokens: int,
) -> None:
    store = store_of(tmp_path_factory.mktemp("store"), lengths, shard_tokens)
    rows = PackedRows(store, row_tokens)
    expected = reference_rows(lengths, row_tokens, shard_tokens)
    assert rows.num_rows == len(expected)
    batch = rows.batch(list(range(len(expected))), len(expected))
    for name in ("input_ids", "labels", "position_ids", "segment_ids"):
        assert getattr(batch, name).tolist() == [row[name] for row in expected], name
    # Nothing is lost: each document trains all its tokens but the first.
    assert int((batch.labels != IGNORED).sum()) == sum(length + 1 for length in lengths)


def loader_of(
    rows: PackedRows, global_rows: int, micro_rows: int, rank: int, ranks: int
) -> StepLoader:
    return StepLoader(
        rows=rows,
        seed=5,
        global_samples=global_rows,
        micro_rows=micro_rows,
        rank=rank,
        num_ranks=ranks,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedRows:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 60)]
    return PackedRows(store_of(tmp_path_factory.mktemp("rows"), lengths), 16)


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 2), (8, 1)])
def test_a_step_holds_the_same_rows_on_every_layout(
    rows: PackedRows, ranks: int, micro_rows: int
) -> None:
    for step in range(30):  # more than an epoch
        (whole,) = loader_of(rows, 8, 8, 0, 1).step(step).micro_batches
        parts = [
            loader_of(rows, 8, micro_rows, rank, ranks).step(step).micro_batches
            for rank in range(ranks)
        ]
        leaves = [parts[n % ranks][n // ranks] for n in range(8 // micro_rows)]
        assert torch.equal(torch.cat([leaf.input_ids for leaf in leaves]), whole.input_ids)
        assert sum((leaf.provenance for leaf in leaves), ()) == whole.provenance


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(rows: PackedRows) -> None:
    loader = loader_of(rows, 8, 8, 0, 1)
    first = loader.order.locate(np.arange(rows.num_rows))
    second = loader.order.locate(np.arange(rows.num_rows, 2 * rows.num_rows))
    assert sorted(first) == sorted(second) == list(range(rows.num_rows))
    assert first != second


def test_rows_of_a_step_are_found_at_once_as_one_by_one(rows: PackedRows) -> None:
    loader = loader_of(rows, 8, 8, 0, 1)
    samples = range(rows.num_rows - 20, 2 * rows.num_rows + 20)  # of three epochs
    expected = []
    for sample in samples:
        epoch, index = divmod(sample, rows.num_rows)
        expected.append(permute(index, rows.num_rows, round_keys("rows", loader.seed, epoch)))
    assert loader.order.locate(np.array(samples)) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_stops_and_other_world_sizes_lose_and_double_nothing(
    rows: PackedRows, data: st.DataObject
) -> None:
    """Draw stops; after each the run goes on with another world size and micro-batch."""
    global_rows, seen, step = 8, [], 0
    state = loader_of(rows, global_rows, 8, 0, 1).state(0)
    for _ in range(data.draw(st.integers(1, 4))):
        ranks = data.draw(st.sampled_from([1, 2, 4, 8]))
        micro_rows = data.draw(
            st.sampled_from([m for m in (1, 2, 4, 8) if (global_rows // ranks) % m == 0])
        )
        if data.draw(st.booleans()):
            global_rows = data.draw(st.sampled_from([8, 16]))
        loaders = [
            loader_of(rows, global_rows, micro_rows, rank, ranks).resumed(step, state)
            for rank in range(ranks)
        ]
        for _ in range(data.draw(st.integers(0, 5))):
            ranges = [r for loader in loaders for r in loader.step(step).ranges]
            seen += sorted(n for first, last in ranges for n in range(first, last))
            step += 1
        state = loaders[0].state(step)
        assert len(json.dumps(state)) < 1024
        assert "rank" not in json.dumps(state)
    assert seen == list(range(len(seen)))
    assert state["global_sample"] == len(seen)


def test_other_data_is_refused_on_resume(rows: PackedRows) -> None:
    loader = loader_of(rows, 8, 8, 0, 1)
    state = loader.state(3)
    for key in ("fingerprint", "seed", "version"):
        with pytest.raises(ValueError, match=key):
            loader.resumed(3, {**state, key: "another"})


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 1), (1, 7), (2, 4), (3, 5)])
def test_evaluation_covers_every_row_once_and_gives_all_ranks_equal_work(
    rows: PackedRows, ranks: int, micro_rows: int
) -> None:
    batches = [
        [
            batch
            for _, batch in EvalLoader(
                rows=rows, micro_rows=micro_rows, rank=r, num_ranks=ranks
            ).batches()
        ]
        for r in range(ranks)
    ]
    assert len({len(b) for b in batches}) == 1
    found = sum(int((b.labels != IGNORED).sum()) for rank in batches for b in rank)
    whole = rows.batch(list(range(rows.num_rows)), rows.num_rows)
    assert found == int((whole.labels != IGNORED).sum())
    assert sum(len(b.provenance) for rank in batches for b in rank) == rows.num_rows


@pytest.mark.parametrize(
    ("changes", "ranks", "legal"),
    [
        ({"micro_rows": 3}, 1, r"\[1, 2, 4, 8\]"),
        ({"micro_rows": 8}, 2, r"\[1, 2, 4\]"),
        ({}, 3, r"run on \[1, 2, 4, 8\] ranks"),
    ],
)
def test_impossible_batches_are_refused_with_the_legal_ones(
    changes: dict[str, int], ranks: int, legal: str
) -> None:
    data = PretrainingData(path="stdlib", row_tokens=16, global_rows=8, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=legal):
        data.rows_per_micro_batch(ranks)


def write_corpus(folder: Path, kind: str) -> Path:
    texts = [f"document {n}: " + "word " * n for n in range(40)]
    folder.mkdir(parents=True)
    if kind == "txt":
        for n, text in enumerate(texts):
            (folder / f"{n:03d}.txt").write_text(text)
    elif kind == "jsonl":
        lines = [json.dumps({"text": text, "n": n}) for n, text in enumerate(texts)]
        (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    elif kind == "csv":
        with open(folder / "all.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["text", "n"], *([text, n] for n, text in enumerate(texts))])
    else:
        import pyarrow as pa
        from pyarrow import feather, parquet

        write = {"parquet": parquet.write_table, "arrow": feather.write_feather}[kind]
        write(pa.table({"text": texts}), folder / f"all.{kind}")
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "arrow"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    source = open_texts(Source(path=str(write_corpus(tmp_path / "in", kind))), "text")
    found = [document.text for document in source.documents()]
    assert found == [f"document {n}: " + "word " * n for n in range(40)]


def test_held_out_documents_are_chosen_by_id_and_never_trained_on(tmp_path: Path) -> None:
    data = PretrainingData(
        path=str(write_corpus(tmp_path / "in", "jsonl")),
        row_tokens=16, global_rows=2, eval_fraction=0.25, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    train, held_out = data.stores(ByteTokenizer())
    assert held_out is not None
    assert train.num_documents + held_out.num_documents == 40
    ids = [document.id for document in open_texts(Source(path=data.path), "text").documents()]
    assert held_out.num_documents == sum(eval_rank(i) < 0.25 for i in ids)
    assert 0 < held_out.num_documents < 25
    (tmp_path / "in").rename(tmp_path / "moved")
    moved, _ = replace(data, path=str(tmp_path / "moved")).stores(ByteTokenizer())
    assert moved.fingerprint == train.fingerprint


def test_a_small_corpus_holds_one_document_out(tmp_path: Path) -> None:
    data = PretrainingData(
        path=str(write_corpus(tmp_path / "in", "jsonl")),
        row_tokens=16, global_rows=2, eval_fraction=1e-9, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    train, held_out = data.stores(ByteTokenizer())
    assert held_out is not None
    assert (train.num_documents, held_out.num_documents) == (39, 1)


def test_an_eval_path_takes_nothing_from_the_training_data(tmp_path: Path) -> None:
    data = PretrainingData(
        path=str(write_corpus(tmp_path / "a", "txt")),
        eval_path=str(write_corpus(tmp_path / "b", "jsonl")),
        row_tokens=16, global_rows=2, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    train, held_out = data.stores(ByteTokenizer())
    assert held_out is not None
    assert train.num_documents == held_out.num_documents == 40


def test_a_changed_file_is_tokenised_anew(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "in", "txt")
    data = PretrainingData(
        path=str(folder), row_tokens=16, global_rows=2, eval_fraction=0.0, cache=str(tmp_path / "c")
    )
    before, _ = data.stores(ByteTokenizer())
    (folder / "007.txt").write_text("changed")
    after, _ = data.stores(ByteTokenizer())
    assert before.fingerprint != after.fingerprint


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("Gr\u00fc\u00dfe " * number)
    path = tmp_path / "1.txt"
    path.write_bytes(b"x" * ((1 << 20) - 1) + "\u00fc".encode() + b"gr\xfc\xdfe")
    with pytest.raises(DataError, match=rf"{path} is not UTF-8 at byte {(1 << 20) + 3}; convert"):
        list(open_texts(Source(path=str(tmp_path)), "text").documents())


def test_a_wrong_column_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"texts": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"no column 'text', only id, texts; did you mean texts"):
        open_texts(Source(path=str(tmp_path)), "text").peek()


def test_a_row_without_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": null}\n')
    with pytest.raises(DataError, match="row 1 of"):
        list(open_texts(Source(path=str(path)), "text").documents())
    with pytest.raises(ValueError, match=r"no column 'body', only text; set data\.column"):
        list(open_texts(Source(path=str(path)), "body").documents())


def test_the_standard_library_is_read_without_its_tests() -> None:
    source = open_texts(Source(path="stdlib"), "text")
    names = {str(file.relative_to(source.root)) for file in source.files}
    assert "argparse.py" in names
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)
