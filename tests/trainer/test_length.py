"""A run is as long as its epochs say: counted on the data, the same on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.data.chat import ChatEncoder
from trainer.data.document_data import DocumentData
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.tokenizers import ByteTokenizer
from trainer.length import steps_of
from trainer.record import read_lines
from trainer.run import Run
from trainer.settle import settle


def rows(path: Path, number: int) -> str:
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(number)))
    return str(path)


def run_on(cache: Path, data: dict[str, Any], **changes: Any) -> Run:
    settings = {"eval_fraction": 0.0, "row_tokens": 64, "global_documents": 8, "micro_rows": 2}
    documents = DocumentData(encoder=ChatEncoder(), cache=str(cache), **settings | data)
    lengths = {"max_steps": None, "max_epochs": 2.0} | changes
    return Run(**vars(tiny_run(cache)) | {"data": documents} | lengths)


def loader_of(run: Run, num_ranks: int) -> StepLoader:
    return run.data.build(
        tokenizer=ByteTokenizer(), seed=0, rank=num_ranks - 1, num_ranks=num_ranks
    )[0]


@pytest.mark.parametrize("max_epochs", [0.3, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("extra", [{}, {"b": 0.5}, {"b": 3.0}])
def test_steps_of_epochs_are_the_first_that_go_through_every_source(
    tmp_path: Path, cache: Path, max_epochs: float, extra: dict[str, float]
) -> None:
    sources = {
        name: Source(path=rows(tmp_path / f"{name}.jsonl", number), epochs=epochs)
        for (name, epochs), number in zip({"a": 1.0, **extra}.items(), (21, 10), strict=False)
    }
    loader = loader_of(run_on(cache, {"sources": sources}), 1)
    # The obvious way: a step after the other, until as many samples were dealt.
    wanted = max_epochs * (21 + 10 * extra.get("b", 0.0))
    step = 0
    while loader.first_sample(step) < wanted:
        step += 1
    assert steps_of(max_epochs, loader) == step
    assert steps_of(max_epochs, loader_of(run_on(cache, {"sources": sources}), 2)) == step
    for name, done in loader.epochs(step).items():
        # A mix of sources is exact to a sample of each.
        assert done >= max_epochs * {"a": 1.0, **extra}[name] - 1 / 10


def test_run_of_epochs_is_the_run_of_so_many_steps(tmp_path: Path, cache: Path) -> None:
    data = {"path": rows(tmp_path / "rows.jsonl", 21)}
    run = run_on(cache, data)
    assert settle(run).max_steps == 6  # 42 documents by 8
    assert settle(settle(run)) == settle(run)
    run_ranks(2, train, tmp_path / "epochs", run)
    run_ranks(1, train, tmp_path / "steps", run_on(cache, data, max_steps=6, max_epochs=None))
    of_epochs, of_steps = (
        read_lines(tmp_path / kind / "metrics.jsonl") for kind in ("epochs", "steps")
    )
    assert [line["step"] for line in of_epochs] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in of_epochs] == [line["lr"] for line in of_steps]
    losses = [line["loss"] for line in of_epochs]
    assert losses == pytest.approx([line["loss"] for line in of_steps], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["experiment=demo"], (400, None)),
        (["experiment=demo", "max_epochs=0.5"], (None, 0.5)),
        (["experiment=sft", "model.path=x"], (None, 3)),
        (["experiment=sft", "model.path=x", "max_steps=7"], (7, None)),
        (["experiment=sft", "model.path=x", "max_steps=7", "max_epochs=2"], (7, 2)),
        (["experiment=sft", "model.path=x", "max_steps=7", "max_epochs=null"], (7, None)),
    ],
)
def test_length_on_the_command_line_replaces_that_of_the_recipe(
    words: list[str], expected: tuple[int | None, float | None]
) -> None:
    tree = compose(words).tree
    assert (tree["max_steps"], tree["max_epochs"]) == expected
