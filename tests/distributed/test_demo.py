"""The demo itself: the same losses on 1, 2 and 4 processes."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import train_words
from trainer.record import read_lines

STEPS = 10
OPTIONS = (
    "experiment=demo",
    # The demo warms up for longer than this: its first steps do not depend on max_steps.
    f"max_steps={STEPS}",
    "log_every=1",
    "eval_every=null",
    "data.max_documents=10",
    "callbacks.ngrams=null",
    "callbacks.closing.sample_tokens=0",
)


def losses(folder: Path, cache: Path, processes: int, *options: str) -> list[float]:
    words = [*OPTIONS, *options, f"data.cache={cache}"]
    assert run_ranks(processes, train_words, folder, words) == [True] * processes
    lines = read_lines(folder / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_the_demo_gives_the_same_losses_on_every_layout_to_1e_6(
    tmp_path: Path, cache: Path
) -> None:
    expected = losses(tmp_path / "one", cache, 1)
    assert len(expected) == STEPS
    for processes in (2, 4):
        for mesh in ("ddp", "fsdp"):
            name = f"{mesh}-{processes}"
            found = losses(tmp_path / name, cache, processes, f"mesh={mesh}")
            assert found == pytest.approx(expected, rel=1e-6, abs=0), name
