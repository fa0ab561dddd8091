"""An evaluation that reads a sample: which rows, on every layout, and what is said of it."""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.nn.head import IGNORED
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from tests.token_folders import store_of, write_folder
from tests.trainer.test_mixed_sources import COUNTS, documents, folder, source_of
from trainer.best import BestSpec
from trainer.callbacks.card import best_in_words, extent_in_words
from trainer.callbacks.console import Console
from trainer.callbacks.protocol import Callback, RunView
from trainer.columns import Columns
from trainer.data.eval_loader import FEWEST, EvalLoader, most_samples
from trainer.data.rows import PackedRows
from trainer.data.tokenizers import ByteTokenizer
from trainer.data.tokens import Part, TokenStore
from trainer.distributed import Placement
from trainer.judges import sample_of
from trainer.mesh import MeshSpec
from trainer.progress import Progress
from trainer.record import read_lines
from trainer.run import Run
from trainer.run_data import data_of, eval_data_of
from trainer.validation.spec import ValidationSpec

__all__ = ["folder"]  # a fixture


def middles(count: int, size: int) -> list[int]:
    """Cut `count` rows into `size` equal stretches and take the one in the middle of each."""
    stretch = Fraction(count, size)
    return [math.floor(stretch * number + stretch / 2) for number in range(size)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedRows:
    """Rows of 16 tokens of two sources, in shards of some rows."""
    folder = tmp_path_factory.mktemp("rows")
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, 60)]
    store_of(folder / "a", lengths, shard_tokens=200)
    write_folder(folder / "b", [20, 9], shard_tokens=200, name="train")
    return PackedRows(TokenStore(*(Part(folder / n, "train", n) for n in "ab")), 16)


def loaders_of(rows: PackedRows, most: int | None, num_ranks: int) -> list[EvalLoader]:
    return [
        EvalLoader(rows=rows, micro_rows=3, rank=rank, num_ranks=num_ranks, most=most)
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("most", [1, 2, 7, 20, 64])
def test_a_sample_is_evenly_spaced_over_each_source_and_the_same_on_every_number_of_ranks(
    rows: PackedRows, most: int, num_ranks: int
) -> None:
    first, second = rows.counts
    assert (first, second) == (125, 3)
    sizes = [most * first // (first + second) or 1, 1]
    chosen = [*middles(first, sizes[0]), *(first + row for row in middles(second, 1))]
    expected = [rows.batch([row], 1) for row in chosen]
    loaders = loaders_of(rows, most, num_ranks)
    assert loaders[0].sizes == sizes
    found = [list(loader.batches()) for loader in loaders]
    assert len({len(own) for own in found}) == 1
    batches = [batch for own in found for _, batch in own]
    read = [row for batch in batches for row in batch.input_ids.tolist()[: len(batch.provenance)]]
    assert sorted(read) == sorted(batch.input_ids[0].tolist() for batch in expected)
    counts = [int((batch.labels != IGNORED).sum()) for batch in batches]
    assert sum(counts) == sum(int((batch.labels != IGNORED).sum()) for batch in expected)


@pytest.mark.parametrize("most", [None, 128, 10**9])
def test_all_is_read_where_nothing_or_enough_is_allowed(rows: PackedRows, most: int | None) -> None:
    (loader,) = loaders_of(rows, most, 1)
    (whole,) = loaders_of(rows, None, 1)
    assert not loader.is_sample
    assert loader.extent == {}
    assert loader.num_bytes == rows.store.num_bytes
    for (source, batch), (same_source, same) in zip(loader.batches(), whole.batches(), strict=True):
        assert source == same_source
        assert batch.input_ids.equal(same.input_ids)


def test_bytes_of_a_sample_are_those_of_its_tokens(rows: PackedRows) -> None:
    (loader,) = loaders_of(rows, 20, 1)
    read = sum(int((batch.segment_ids > 0).sum()) for _, batch in loader.batches())
    expected = rows.store.num_bytes * read / rows.store.num_tokens
    assert loader.num_bytes == pytest.approx(expected, rel=1e-12)
    assert loader.extent == {"num_rows": 20, "num_rows_held_out": 128}


def test_documents_of_all_sources_are_sampled_by_their_share(folder: Path) -> None:
    data = replace(documents(folder), eval_path=str(folder / "wiki.jsonl"))
    _, plain = data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    training = documents(folder).build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)[0]
    assert plain is not None
    assert not plain.is_sample
    loader = EvalLoader(rows=training.rows, micro_rows=2, rank=0, num_ranks=1, most=20)
    names = [
        name for _, batch in loader.batches() for row in batch.provenance for name in row.split(",")
    ]
    found = [source_of(name) for name in names if name]
    total = sum(COUNTS.values())
    assert {name: found.count(name) for name in COUNTS} == {
        name: 20 * count // total for name, count in COUNTS.items()
    }
    lengths = [training.rows.num_tokens([n]) for n in range(total)]
    read = sum(int((batch.segment_ids > 0).sum()) for _, batch in loader.batches())
    whole = training.rows.store.num_bytes
    assert loader.num_bytes == pytest.approx(whole * read / sum(lengths), rel=1e-12)


def test_the_bound_is_a_share_of_the_steps_between_with_a_forward_pass_as_a_third() -> None:
    # 500 steps of 16 rows: 1 % of 8,000 rows trained is 80, or 240 rows that are only judged.
    assert most_samples(0.01, 500, 16, "rows") == 240
    assert most_samples(0.02, 500, 1024, "documents") == 30_720
    assert most_samples(0.01, 1, 8, "rows") == FEWEST["rows"]
    assert most_samples(0.01, 1, 8, "documents") == FEWEST["documents"]


@pytest.mark.parametrize("share", [0.0, -0.5, math.inf])
def test_a_share_that_is_none_is_refused(cache: Path, share: float) -> None:
    with pytest.raises(ValueError, match=r"eval_share=.* is not positive; set it to 0\.01"):
        tiny_run(cache, eval_share=share)


@dataclass(kw_only=True)
class Judge(Callback):
    """Evaluates the rows of the sample one by one: its own spec and callback."""

    found: list[tuple[float, float]] = field(default_factory=list)

    def build(self) -> "Judge":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.view = view
        assert "evaluations read 64 of 115 rows (eval_share)" in view.banner["data"]

    def on_eval(self, progress: Progress, metrics: dict[str, Any]) -> None:
        assert self.view.eval_loader is not None
        rows = self.view.eval_loader.rows
        assert isinstance(rows, PackedRows)
        losses = [
            self.view.engine.eval_step(rows.batch([row], 1))
            for row in middles(rows.num_rows, FEWEST["rows"])
        ]
        expected = sum(float(loss.sum) for loss in losses), sum(int(x.num_targets) for x in losses)
        assert metrics["num_targets"] == expected[1]
        assert metrics["loss"] == pytest.approx(expected[0] / expected[1], rel=1e-12)
        # A byte is a token; two more stand around each document.
        assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2), rel=0.1)
        self.found.append(expected)


def evals(folder: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["split"] == "eval"]
    return [{key: line[key] for key in line if key not in ("time", "split")} for line in lines]


def sampled(cache: Path, folder: Path, **changes: Any) -> Run:
    text = folder / "held_out.jsonl"
    lines = (" ".join(f"def f{n}(x): return x + {m}" for m in range(15)) for n in range(10))
    text.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    settings: dict[str, Any] = {
        "precision": "fp64", "max_steps": 4, "eval_every": 2, "save_every": 2, "eval_share": 0.01,
        "data_eval_path": str(text),
    }  # fmt: skip
    return tiny_run(cache, **settings | changes)


def judged(placement: Placement, folder: Path, run: Run) -> int:
    judge = Judge()
    train(placement, folder, replace(run, callbacks={"judge": judge}))
    return len(judge.found)


def test_a_run_evaluates_the_same_rows_each_time_on_every_layout_and_after_a_resume(
    tmp_path: Path, cache: Path
) -> None:
    run = sampled(cache, tmp_path)
    assert run_ranks(1, judged, tmp_path / "one", run) == [2]
    one = evals(tmp_path / "one")
    assert [(line["num_rows"], line["num_rows_held_out"]) for line in one] == [(64, 115)] * 2
    for name, mesh in (("ddp", MeshSpec(dp_replicate=-1)), ("fsdp", MeshSpec(dp_shard=-1))):
        run_ranks(2, train, tmp_path / name, replace(run, mesh=mesh))
        for found, expected in zip(evals(tmp_path / name), one, strict=True):
            assert found == pytest.approx(expected, rel=1e-12)
    run_ranks(1, train, tmp_path / "again", replace(run, max_steps=2))
    run_ranks(1, train, tmp_path / "again", run)
    assert evals(tmp_path / "again") == one


def test_after_a_resume_with_another_sample_the_best_is_one_of_it(
    tmp_path: Path, cache: Path
) -> None:
    """Losses fall and more is better: the first evaluation stays the best while it counts."""
    run = sampled(cache, tmp_path, best=BestSpec(metric="loss", goal="max", patience=3))
    pointer = tmp_path / "run/checkpoints/best"
    run_ranks(1, train, tmp_path / "run", run)
    assert pointer.read_text() == "step_00000002\n"
    run_ranks(1, train, tmp_path / "run", replace(run, max_steps=6))
    assert pointer.read_text() == "step_00000002\n"
    run_ranks(1, train, tmp_path / "run", replace(run, max_steps=10, eval_share=None))
    assert [line["step"] for line in evals(tmp_path / "run")] == [2, 4, 6, 8, 10]
    assert pointer.read_text() == "step_00000008\n"


def test_answers_are_of_other_rows_than_losses(tmp_path: Path, cache: Path) -> None:
    spec = BestSpec(metric="exact_match")
    asked = sampled(cache, tmp_path, validation=ValidationSpec(every=1, max_documents=5), best=spec)
    by_loss = replace(asked, best=BestSpec(metric="loss"))
    _, _, loader = data_of(asked)
    assert loader is not None
    whole = replace(loader, most=None)
    found = [sample_of(run, each) for run in (asked, by_loss) for each in (loader, whole)]
    assert [str(sample).split()[0] for sample in found] == ["5", "5", "64", "115"]
    assert sample_of(asked, None) == "nothing"


def test_what_is_evaluated_alone_is_all(tmp_path: Path, cache: Path) -> None:
    run = sampled(cache, tmp_path)
    _, _, bounded = data_of(run)
    assert bounded is not None
    assert bounded.is_sample
    for whole in (data_of(replace(run, eval_share=None))[2], eval_data_of(run)[1]):
        assert whole is not None
        assert not whole.is_sample


def test_the_line_of_an_evaluation_says_how_much_was_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    console = Console(progress_bar=False).build()
    console.max_steps, progress = 4, Progress(torch.device("cpu"))
    found = {"loss": 2.0, "num_targets": 990, "num_documents": 8, "num_documents_held_out": 90}
    with caplog.at_level("INFO"):
        console.on_eval(progress, found)
        console.on_eval(progress, {"loss": 2.0, "num_targets": 990})
    sampled, whole = caplog.messages
    assert sampled.endswith("| loss  2.0000 | on 8 of 90 held-out documents (990 targets)")
    assert whole.endswith("| loss  2.0000")


def test_words_say_how_much_was_read_and_nothing_of_all() -> None:
    found = {"loss": 2.0, "num_targets": 15_000, "num_rows": 60, "num_rows_held_out": 1_320}
    assert extent_in_words(found) == "60 of 1,320 held-out rows (15,000 targets)"
    assert extent_in_words({"loss": 2.0, "num_targets": 15_000}) == ""
    evals = Columns()
    evals.add([{"step": 5, "split": "eval", **found}])
    assert best_in_words(evals, BestSpec()) == (
        "best loss 2 at step 5, of 1, on 60 of 1,320 held-out rows (15,000 targets)"
    )
    of_all = Columns()
    of_all.add([{"step": 5, "split": "eval", "loss": 2.0, "num_targets": 15_000}])
    assert best_in_words(of_all, BestSpec()) == "best loss 2 at step 5, of 1"
