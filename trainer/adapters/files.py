"""The folder of an adapter: peft's files, and which base they belong to."""

import json
from collections.abc import Iterable
from typing import Any

import xxhash
from torch import nn

from models.nn.prompt import prompt_rows
from trainer.checkpoint.commit import hash_ranges
from trainer.distributed import Ranks
from trainer.weights import WeightSource

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""
PROMPT, PROMPT_PREFIX = "prompt_embeddings", "base_model."
"""Of virtual tokens: their name, and what stands before those of all else: nothing is wrapped."""
_BITS = 40  # of each part of a hash: sums of 2 ** 23 tensors fit int64


def names_in_file(model: nn.Module, trained: Iterable[str]) -> dict[str, str]:
    """Map the names of trained weights to those in peft's file."""
    rows = prompt_rows(model)
    prefix = PROMPT_PREFIX if rows else PREFIX
    return {name: PROMPT if name in rows else f"{prefix}{name}" for name in trained}


def hash_of_files(source: WeightSource, ranks: Ranks | None = None) -> str:
    """Return a hash of every tensor of the base: name, type, shape and bytes.

    Collective with `ranks`: each reads its share. The parts are added up, so shares do not matter.
    """
    rank, count = (ranks.placement.rank, ranks.placement.world_size) if ranks else (0, 1)
    parts = [0, 0, 0]
    for name, entry in sorted(source.entries.items())[rank::count]:
        content = hash_ranges(source.folder / entry.file, [(entry.start, entry.stop)])
        text = f"{name} {entry.dtype} {entry.shape} {content}"
        number = xxhash.xxh3_128_intdigest(text.encode())
        for place in range(len(parts)):
            parts[place] += number >> (place * _BITS) & (1 << _BITS) - 1
    total = ranks.total(parts) if ranks else parts
    return xxhash.xxh3_128_hexdigest(json.dumps(total).encode())


def check_base(found: str, stated: str | None, advice: str) -> None:
    """Raise ValueError where an adapter states another base than the one found."""
    if stated not in (None, found):
        raise ValueError(
            f"the adapter was trained on a base of hash {stated}, this one has {found}; {advice}"
        )


def hash_of_seed(**facts: Any) -> str:
    """Return a hash of a base that is made from a seed: these facts decide every number of it."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode()))
