"""Peak memory of a frozen base in 16 bits and in 4: filling it, and one pass through it.

    python -m benchmarks.base_memory            two rows, each from a process of its own

Llama of 550 M parameters, bf16, LoRA of rank 16 on all linears, 8 tokens; needs the extra qlora.
Large blocks get pages of their own (MALLOC_MMAP_THRESHOLD_): else what glibc has kept for later
counts as used.
"""

import os
import subprocess
import sys
from typing import Literal

import torch
from torch import Tensor

from models.llama import LlamaSpec
from trainer.adapters.lora import LoRA
from trainer.adapters.nf4 import CHOICES
from trainer.meter import host_bytes
from trainer.parallel.materialise import materialise

SPEC = LlamaSpec(
    vocab_size=1024, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12,
    num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=512,
    tie_word_embeddings=True,
)  # fmt: skip
PATTERN = torch.sin(torch.arange(1 << 14) * 12.9898) * 0.02


def values(_: str, start: int, stop: int) -> Tensor:
    """Return numbers that cost no time, in the type of a file."""
    count = stop - start
    return PATTERN.repeat(-(-count // len(PATTERN)))[:count].to(torch.bfloat16)


def gib(kind: Literal["VmHWM", "VmRSS"]) -> float:
    """Return what this process holds, or held at most."""
    return host_bytes(kind) / 2**30


def measure(quantize: str) -> None:
    """Print what filling and a pass add to this process at most."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = SPEC.build_causal_lm(chunk_tokens=64)
    LoRA(quantize=quantize).apply(model, SPEC.layout)
    model.to(torch.bfloat16)
    if quantize != "none":
        import bitsandbytes.functional  # noqa: F401  before memory is counted
    before = gib("VmRSS")
    materialise(model, torch.device("cpu"), values)
    filled, kept = gib("VmHWM") - before, gib("VmRSS") - before
    ids = torch.arange(8)[None]
    model(ids, ids, torch.ones_like(ids)).sum().backward()
    peak = gib("VmHWM") - before
    print(f"{quantize:<5} filled {kept:.2f} GiB, at most {filled:.2f}; a pass at most {peak:.2f}")


def main() -> None:
    """Measure the choice that is named, or every one in a fresh process."""
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    for choice in CHOICES:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.base_memory", choice],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}, check=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
