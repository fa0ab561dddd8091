"""Several sources with shares: exact at every step, each source once per epoch, on any ranks."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from tests.token_folders import write_folder
from trainer.batch import Batch
from trainer.data.chat import ChatEncoder
from trainer.data.classification import SequenceEncoder
from trainer.data.document_data import DocumentData
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source, named_sources
from trainer.data.preferences import PreferenceEncoder
from trainer.data.pretraining import PretrainingData
from trainer.data.token_folder import TokenFolder
from trainer.data.tokenizers import ByteTokenizer
from trainer.mesh import MeshSpec
from trainer.record import read_lines

COUNTS = {"wiki": 30, "code": 12, "talk": 5}
KINDS = ("loss", "num_targets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, count in COUNTS.items():
        lines = [json.dumps({"text": f"{name} {n} " + "so " * (n % 4)}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def sources(folder: Path, **settings: Any) -> dict[str, Source]:
    return {
        name: Source(path=str(folder / f"{name}.jsonl"), **settings.get(name, {}))
        for name in COUNTS
    }


def documents(folder: Path, **settings: Any) -> DocumentData:
    return DocumentData(
        sources=sources(folder, **settings), encoder=ChatEncoder(), eval_fraction=0.0,
        row_tokens=64, global_documents=8, micro_rows=2, cache=str(folder / "cache"),
    )  # fmt: skip


def loader_of(data: Any, rank: int = 0, num_ranks: int = 1) -> StepLoader:
    loader: StepLoader = data.build(
        tokenizer=ByteTokenizer(), seed=3, rank=rank, num_ranks=num_ranks
    )[0]
    return loader


def taken(loader: StepLoader, steps: range) -> list[str]:
    """Return the documents of some steps by name, in no order within a step."""
    found = []
    for step in steps:
        names = [name for row in loader.step(step).provenance for name in row.split(",") if name]
        found += sorted(names)
    return found


def source_of(name: str) -> str:
    return name.partition("/")[0]


WEIGHTS = {"wiki": {"weight": 1.0}, "code": {"weight": 2.0}, "talk": {"weight": 0.5}}


def test_shares_are_exact_and_every_source_is_gone_through_in_epochs_of_its_own(
    folder: Path,
) -> None:
    loader = loader_of(documents(folder, **WEIGHTS))
    names = taken(loader, range(70))  # 560 samples
    total = Counter(map(source_of, names))
    for name, setting in WEIGHTS.items():
        assert abs(total[name] - 560 * setting["weight"] / 3.5) <= 4  # within one block
        counts = Counter(one for one in names if source_of(one) == name)
        assert len(counts) == COUNTS[name]
        assert max(counts.values()) - min(counts.values()) <= 1
    done = loader.epochs(70)
    for name, count in COUNTS.items():
        assert done[name] == pytest.approx(total[name] / count, abs=4 / count)
    assert "code 26.6" in loader.position(70)


def test_without_weights_every_source_is_read_equally_often_or_as_epochs_say(folder: Path) -> None:
    loader = loader_of(documents(folder))
    names = taken(loader, range(47))  # 8 times all documents
    assert set(Counter(names).values()) <= {7, 8, 9}
    assert loader.epochs(47) == pytest.approx(dict.fromkeys(COUNTS, 8.0), abs=0.2)
    twice = loader_of(documents(folder, talk={"epochs": 3.0}))
    done = twice.epochs(400)
    assert done["talk"] / done["wiki"] == pytest.approx(3, rel=0.02)
    assert done["code"] / done["wiki"] == pytest.approx(1, rel=0.02)


def test_the_order_is_that_of_a_slow_table(folder: Path) -> None:
    order = loader_of(documents(folder, **WEIGHTS)).order
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    bounds = np.cumsum([0, *COUNTS.values()])
    for sample in range(300):
        (row,) = order.locate(np.array([sample]))
        source = int(np.searchsorted(bounds, row, side="right")) - 1
        seen[source].append(row - int(bounds[source]))
    for source, count in enumerate(COUNTS.values()):
        epochs = [seen[source][n : n + count] for n in range(0, len(seen[source]), count)]
        whole = [epoch for epoch in epochs if len(epoch) == count]
        # Places within a block are shuffled, so an epoch's last samples may change with the next's.
        assert len(set(map(tuple, whole))) == len(whole) or count < 6
        assert all(len(set(epoch)) >= count - 4 for epoch in whole)
    several = order.locate(np.arange(300))
    assert several == [order.locate(np.array([n]))[0] for n in range(300)]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_step_is_the_same_on_any_ranks(folder: Path, num_ranks: int) -> None:
    data = documents(folder, **WEIGHTS)
    for step in (0, 5):
        alone = taken(loader_of(data), range(step, step + 1))
        shared = [taken(loader_of(data, r, num_ranks), range(step, step + 1))
                  for r in range(num_ranks)]  # fmt: skip
        assert sorted(name for names in shared for name in names) == alone


def test_the_state_names_weights_and_epochs_and_other_weights_are_refused(folder: Path) -> None:
    loader = loader_of(documents(folder, **WEIGHTS))
    state = loader.state(10)
    assert state["epoch"] == min(map(int, loader.epochs(10).values())) == 0
    assert len(json.dumps(state)) < 512
    assert taken(loader.resumed(10, state), range(10, 14)) == taken(loader, range(10, 14))
    other = loader_of(documents(folder))
    with pytest.raises(
        ValueError, match=r"data\.sources had the shares wiki 2, code 4, talk 1 when"
    ):
        other.resumed(10, state).mixed(may_change=False)


def test_rows_of_mixed_texts_name_their_source_and_each_source_is_evaluated(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    data = PretrainingData(
        sources=sources(folder, **WEIGHTS), eval_fraction=0.2, row_tokens=32, global_rows=8,
        micro_rows=2, cache=str(folder / "cache"),
    )  # fmt: skip
    loader, evaluation = data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    found = Counter(source_of(name) for step in range(35) for name in loader.step(step).provenance)
    assert found == pytest.approx({"wiki": 80, "code": 160, "talk": 40}, abs=4)
    assert evaluation is not None
    run = replace(tiny_run(cache, precision="fp64", max_steps=3, eval_every=3), data=data)
    run_ranks(1, train, tmp_path / "1", run)
    run_ranks(2, train, tmp_path / "2", replace(run, mesh=MeshSpec(dp_shard=2)))
    one, two = (read_lines(tmp_path / n / "metrics.jsonl")[-1] for n in "12")
    parts = [f"loss/{part.source}" for part in evaluation.rows.store.parts]
    assert len(parts) == 3
    for key in ("loss", *parts):
        assert two[key] == pytest.approx(one[key], rel=1e-12)
    assert min(one[key] for key in parts) < one["loss"] < max(one[key] for key in parts)
    logged = [read_lines(tmp_path / n / "metrics.jsonl") for n in "12"]
    assert [line["split"] for line in logged[0]] == ["train", "train", "train", "eval"]
    for alone, shared in zip(*logged, strict=True):
        for key in (f"num_targets/{name}" for name in COUNTS):
            assert shared[key] == alone[key]
        there = [name for name in COUNTS if alone[f"num_targets/{name}"]]
        assert len(there) >= 2
        assert {alone[f"loss/{name}"] for name in COUNTS if name not in there} <= {"NaN"}
        losses, counts = ([alone[f"{kind}/{name}"] for name in there] for kind in KINDS)
        assert sum(counts) == alone["num_targets"]
        assert np.average(losses, weights=counts) == pytest.approx(alone["loss"], rel=1e-12)
        assert [shared[f"loss/{name}"] for name in there] == pytest.approx(losses, rel=1e-12)


def check_sources(batch: Batch, names: list[str]) -> int:
    """Compare the source of each target with what the row cites; return how many rows mix some."""
    assert batch.sources is not None
    assert batch.num_sources == len(names)
    assert batch.sources.shape == batch.targets.shape[:2]
    num_mixed = 0
    for row, cited in enumerate(batch.provenance):
        sources = [names.index(source_of(one)) for one in cited.split(",")]
        num_mixed += len(set(sources)) > 1
        if batch.class_labels is not None:
            assert batch.sources[row, : len(sources)].tolist() == sources
            continue
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            own = batch.sources[row, batch.segment_ids[row] == segment]
            # A row of texts cites a run of documents of one source.
            assert set(own.tolist()) == {sources[min(segment, len(sources)) - 1]}
    return num_mixed


@pytest.mark.parametrize("kind", ["text", "chat", "classes", "numbers", "pairs"])
def test_every_target_names_the_source_of_its_document(tmp_path: Path, kind: str) -> None:
    row: dict[str, Any] = {"text": "a text", "label": "good", "numbers": [1.0, 2.0]}
    encoders: dict[str, Any] = {
        "chat": ChatEncoder(), "pairs": PreferenceEncoder(),
        "classes": SequenceEncoder(labels=("bad", "good")),
        "numbers": SequenceEncoder(
            labels=("a", "b"), label="numbers", problem_type="regression"
        ),
    }  # fmt: skip
    if kind == "pairs":
        row = {"prompt": "what?", "chosen": "this", "rejected": "that"}
    for name in COUNTS:
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 6)
    settings: dict[str, Any] = {
        "sources": sources(tmp_path), "row_tokens": 64, "micro_rows": 2, "eval_fraction": 0.0,
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    if kind == "text":
        data: Any = PretrainingData(global_rows=8, **settings)
    else:
        data = DocumentData(encoder=encoders[kind], global_documents=15, **settings)
    loaders = [loader_of(data), loader_of(data, rank=1, num_ranks=2)]
    batches = [b for loader in loaders for n in range(3) for b in loader.step(n).micro_batches]
    mixed = [check_sources(batch, list(COUNTS)) for batch in batches]
    assert (sum(mixed) > 0) == (kind != "text")
    alone = replace(data, sources={"wiki": settings["sources"]["wiki"]})
    (batch, *_) = loader_of(alone).step(0).micro_batches
    assert (batch.sources, batch.num_sources) == (None, 0)


def test_shards_of_several_folders_are_one_store(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_folder(tmp_path / name, [50, 20, 60], shard_tokens=30, name="train")
    data = TokenFolder(
        sources={n: Source(path=str(tmp_path / n), weight=1.0) for n in "ab"}, row_tokens=16,
        global_rows=4,
    )  # fmt: skip
    data.check()
    store, _ = data.stores()
    assert store.num_tokens == 272  # each has BOS and EOS
    assert [store.cite(n, n + 1) for n in (0, 2, 3, 5)] == [
        "a/train[0:1]", "a/train[2:3]", "b/train[0:1]", "b/train[2:3]",
    ]  # fmt: skip
    assert [store.document(store.cite(n, n + 1)) for n in range(6)] == [*range(6)]
    for other in ("", "a/train[0:2]", "a/train[3:4]", "c/train[0:1]", "a/train[0:1],b/train[0:1]"):
        assert store.document(other) is None
    names = {source_of(name) for name in loader_of(data).step(0).provenance}
    assert names == {"a", "b"}


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        (None, None, "data.path is missing; set data.path="),
        ("x", {"a": Source(path="y")}, "both set; leave one of them out"),
        (
            None,
            {"a": Source(path="x", weight=1.0), "b": Source(path="y")},
            "data.sources.b has none",
        ),
        (None, {"a/b": Source(path="x")}, "data.sources.a/b is no name"),
    ],
)
def test_sources_that_cannot_be_are_refused(path: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_sources(path, given)


def test_shares_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="weight and epochs say the same"):
        Source(path="x", weight=1.0, epochs=1.0)
    with pytest.raises(ValueError, match="weight=0 is no positive number"):
        Source(path="x", weight=0)
