"""The demo itself: the same losses on 1, 2 and 4 processes."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import train_words
from trainer.record import read_lines

STEPS = 6
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


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[float]:
    return losses(tmp_path_factory.mktemp("demo") / "one", cache, 1)


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, "ddp"), (4, "fsdp"),
        pytest.param(2, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "ddp", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_demo_gives_the_same_losses_on_every_layout_to_1e_6(
    tmp_path: Path, cache: Path, expected: list[float], processes: int, mesh: str
) -> None:
    assert len(expected) == STEPS
    found = losses(tmp_path, cache, processes, f"mesh={mesh}")
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
