"""What does attention by document save on a CPU, beside torch's kernel under a dense mask?

    python -m benchmarks.attention [tokens=4096] [row=512] [heads=8] [size=64] [rounds=7]

For documents of each length in rows of `row` tokens: milliseconds of a layer's forward and backward
pass under the mask that sdpa takes elsewhere, and document by document; in turn, the mask prepared
before. The last line is one document a row of 2,048 tokens.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.in_turn import read_texts, show, spread
from launch.exit_codes import BAD_CONFIG, FINISHED
from launch.host_memory import keep_freed_memory
from models.nn.dense import Sdpa
from models.nn.segments import Segments, dense_mask

DEFAULTS = {"tokens": "4096", "row": "512", "heads": "8", "size": "64", "rounds": "7"}
LENGTHS = (8, 32, 64, 128, 256, 512)
LONG_ROW = 2048


def main(words: list[str]) -> int:
    """Measure and print; return the exit code."""
    try:
        options = {key: int(value) for key, value in read_texts(words, DEFAULTS).items()}
    except ValueError as error:
        print(f"attention: {error}", file=sys.stderr)
        return BAD_CONFIG
    keep_freed_memory("cpu", os.environ)  # as a rank of a run does
    rounds = options.pop("rounds")
    print("| dtype | documents of | mask: forward | backward | by document: forward | backward |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        cases = [(length, options["row"]) for length in LENGTHS if length <= options["row"]]
        for length, row in (*cases, (LONG_ROW, LONG_ROW)):
            found = measure(length, dtype, rounds, **(options | {"row": row}))
            cells = [show(spread(times[1:]), 1) for side in found for times in side]
            print(f"| {str(dtype)[6:]} | {length} | {' | '.join(cells)} |", flush=True)
    return FINISHED


def measure(
    length: int, dtype: torch.dtype, rounds: int, *, tokens: int, row: int, heads: int, size: int
) -> list[tuple[list[float], list[float]]]:
    """Return the milliseconds of forward and backward of each round, of each side."""
    shape = (max(1, tokens // row), row, heads, size)
    segments = Segments.within(torch.arange(row).div(length, rounding_mode="floor")[None] + 1)
    segments = Segments.within(segments.query.repeat(shape[0], 1))
    query, key, value, gradient = (
        torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(4)
    )
    mask, sdpa, scale = dense_mask(segments), Sdpa(), size**-0.5
    documents = sdpa.prepare(segments)

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def by_document() -> Tensor:
        return sdpa.attend(query, key, value, documents, dropout=0.0, scale=scale)

    found: list[tuple[list[float], list[float]]] = [([], []), ([], [])]
    for _ in range(rounds):
        for side, attend in zip(found, (masked, by_document), strict=True):
            _time(attend, [query, key, value], gradient.detach(), side)
    return found


def _time(
    attend: Callable[[], Tensor],
    leaves: list[Tensor],
    gradient: Tensor,
    times: tuple[list[float], list[float]],
) -> None:
    start = time.perf_counter()
    out = attend()
    middle = time.perf_counter()
    torch.autograd.grad(out, leaves, gradient)
    for each, seconds in zip(times, (middle - start, time.perf_counter() - middle), strict=True):
        each.append(1e3 * seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
