"""Messages per step: the textbook's count, and not one more."""

import pytest

from benchmarks.collectives import count, small_demo
from tests.ranks import run_ranks
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.verify.layouts import LAYOUTS
from trainer.verify.shrink import Small

BLOCKS, ROWS, MICRO_ROWS = 4, 8, 2


@pytest.fixture(scope="module")
def small() -> Small:
    return small_demo()


def expected(layout: str, micro_batches: int) -> dict[str, int]:
    """Of one step; the head's logits exist in one chunk."""
    if layout == "ddp":  # targets, loss; one bucket of gradients
        return {"all-reduce": 3}
    if layout == "fsdp":
        # Targets, loss, norm. Weights of a block twice, of the last one and of the root once, for
        # each micro-batch; gradients of each once, with the last micro-batch.
        return {
            "all-reduce": 3,
            "all-gather": micro_batches * 2 * BLOCKS,
            "reduce-scatter": BLOCKS + 1,
        }
    # Attention and feed-forward layer, forward and backward; the embedding's end, the head's start.
    passes = micro_batches * (4 * BLOCKS + 2)
    if layout == "tp":  # the norm; a token's three numbers by chunk
        return {"all-reduce": passes + 1, "all-gather": micro_batches}
    if layout == "tp_sp":  # the norm; gradients of norms, which each rank has of its tokens
        return {
            "all-reduce": 2,
            "all-gather": passes + micro_batches,
            "reduce-scatter": passes,
        }
    if layout == "cp":  # keys and values of a block; segments once
        return {
            "all-reduce": 3,
            "all-gather": micro_batches * (BLOCKS + 1),
            "reduce-scatter": micro_batches * BLOCKS,
        }
    assert layout == "pp"
    # The first stage sends hidden states and receives gradients. Loss, norm, the tied vocabulary.
    return {"all-reduce": 3, "send": micro_batches, "recv": micro_batches}


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp", "tp_sp", "cp", "pp"])
def test_a_step_sends_no_more_than_the_textbook_says(small: Small, layout: str) -> None:
    named = LAYOUTS[layout]
    lengths = named.mesh.lengths
    data_ranks = lengths["dp_replicate"] * lengths["dp_shard"]
    messages = run_ranks(named.processes, count, small, named)[0]
    assert dict(messages.counts) == expected(layout, ROWS // (data_ranks * MICRO_ROWS))


def test_ulysses_exchanges_twice_per_block_and_back(small: Small) -> None:
    import_deepspeed("cpu")
    messages = run_ranks(2, count, small, LAYOUTS["zero2_ulysses"])[0]
    assert messages.counts["all-to-all"] == ROWS // MICRO_ROWS * BLOCKS * 4
