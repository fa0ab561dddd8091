"""The comparison of peak memory: what theirs is given, and how a figure is read off the curves."""

from typing import Any

import pytest
import torch

from benchmarks.peak_memory import figure_of, main
from benchmarks.peak_memory_sides import collated, documents_of, rows_of
from launch.exit_codes import BAD_CONFIG
from models.nn.head import IGNORED
from trainer.batch import Batch


def batch(**more: Any) -> Batch:
    """Return a row of three tokens and two, and a row of one and padding."""
    ids = torch.arange(1, 13).view(2, 6)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    labels = torch.where(segments > 0, ids + 1, IGNORED)
    return Batch(
        input_ids=ids, labels=labels, position_ids=ids, segment_ids=segments,
        class_labels=torch.tensor([[1, 0], [1, IGNORED]]), provenance=("a", "b"), **more,
    )  # fmt: skip


def curve(peak_gib: float, loss: float = 3.0) -> dict[str, Any]:
    return {
        "stamps": [0.0, 1.0, 2.0, 4.0, 7.0],
        "held_gib": 1.0,
        "peak_gib": peak_gib,
        "losses": [loss],
    }


def test_documents_are_taken_out_of_their_rows_with_their_labels() -> None:
    documents = documents_of(batch())
    assert [row["input_ids"].tolist() for row in documents] == [[1, 2, 3], [4, 5], [7]]
    assert [int(row["labels"]) for row in documents] == [1, 0, 1]
    padded = collated(documents)
    assert padded["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0], [7, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_rows_are_cut_to_the_longest_and_have_our_targets() -> None:
    images = {
        "pixel_values": torch.zeros(2, 7, 3, 4, 4),
        "image_attention_mask": torch.ones(2, 6, 7, dtype=torch.int64),
    }
    rows = collated(rows_of(batch(**images)))
    assert rows["labels"].tolist() == [[IGNORED, 2, 3, 4, 5], [IGNORED, 8, *[IGNORED] * 3]]
    assert rows["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]
    assert rows["image_attention_mask"].shape == (2, 5, 7)
    assert rows["pixel_values"].shape == (2, 7, 3, 4, 4)


def test_full_rows_have_no_mask() -> None:
    full = Batch(
        input_ids=torch.ones(2, 3, dtype=torch.int64), labels=torch.ones(2, 3),
        position_ids=torch.ones(2, 3), segment_ids=torch.ones(2, 3), provenance=("a", "b"),
    )  # fmt: skip
    assert set(collated(rows_of(full))) == {"input_ids", "labels"}


def test_a_figure_is_the_ratio_of_median_peaks() -> None:
    figure = figure_of("llama pretrain", [*map(curve, (1.0, 2.0, 9.0))], [curve(4.0)])
    assert (figure.value, figure.is_met) == (0.5, True)
    assert "a step: 2.00 and 2.00 s" in figure.name
    assert not figure_of("llama pretrain", [curve(4.5)], [curve(4.0)]).is_met


def test_sides_that_begin_with_another_loss_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"step 1 is 3.0000 of ours and 3.1000 of theirs"):
        figure_of("llama pretrain", [curve(1.0)], [curve(4.0, loss=3.1)])


@pytest.mark.parametrize("word", ["only=opt", "steps=3", "round=1"])
def test_a_wrong_option_is_refused_before_anything_starts(word: str) -> None:
    assert main([word]) == BAD_CONFIG
