"""No tensor of tokens x vocabulary: a whole step of a real size, on tensors without memory."""

from math import prod

import pytest
from torch import nn

from launch.compose import compose
from launch.train import bind_with_launch
from trainer.planning.apart import apart
from trainer.planning.live import Block
from trainer.planning.step import pretend
from trainer.run import Run

ROWS, ROW_TOKENS, HIDDEN, VOCAB = 2, 2048, 2048, 128_256  # of Llama 3.2 1B


def blocks_of_a_step(run: Run) -> list[Block]:
    """Return every storage of forward pass, backward pass and update."""

    def as_it_is(_: nn.Module) -> None:
        pass

    ledger, _ = pretend(run, 1, 0, as_it_is)
    return ledger.blocks


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_of_a_large_vocabulary_never_holds_all_logits(precision: str) -> None:
    words = [
        "model=llama_3_2_1b", "weights=random", "tokenizer=byte", "data=stdlib", "mesh=single",
        f"data.row_tokens={ROW_TOKENS}", f"data.global_rows={ROWS}", f"data.micro_rows={ROWS}",
        f"precision={precision}", "max_steps=1",
    ]  # fmt: skip
    run, _ = bind_with_launch(compose(words).tree | {"name": "large"})
    blocks = apart(blocks_of_a_step, run)
    sizes = [prod(block.shape) for block in blocks]
    of_vocabulary = [block.shape for block in blocks if VOCAB in block.shape]
    assert {block.phase for block in blocks} >= {"forward", "backward"}
    assert max(sizes) == VOCAB * HIDDEN < ROWS * ROW_TOKENS * VOCAB
    # A chunk of tokens at a time, and wide in no pass but those over a few rows.
    chunks = [shape[0] for shape in of_vocabulary if shape[-1] == VOCAB]
    assert max(chunks) == 1024
    widest = max(block.num_bytes for block in blocks)
    assert widest == VOCAB * HIDDEN * 4  # weight, gradient and state in fp32; nothing in fp64
    # Gradients of the head and the embedding, which share a weight, and their sum in its dtype: no
    # further one is formed to scale them.
    wide = [b for b in blocks if (b.phase, b.num_bytes) == ("backward", widest)]
    assert len(wide) == (1 if precision == "bf16" else 3)
