"""What of an adapted run's weights goes into its checkpoints."""

from pathlib import Path

from torch import nn

from trainer.adapters.files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    check_base,
    hash_of_files,
    hash_of_seed,
)
from trainer.checkpoint.contents import BASE, Contents
from trainer.distributed import Ranks
from trainer.run import Run

ADAPTER = "adapter"


def contents_of(run: Run, model: nn.Module, ranks: Ranks) -> Contents:
    """Return what to save of the planned model: all of it, or what trains beside a frozen base.

    ValueError where a given adapter belongs to another base. Collective.
    """
    config = run.adapter.peft_config(model)
    if config is None:
        return Contents()
    source = run.weight_source(model)
    base_hash = (
        hash_of_files(source, ranks)
        if source
        else hash_of_seed(
            seed=run.seed,
            std=run.model.initializer_range,
            shapes={n: list(p.shape) for n, p in model.named_parameters() if not p.requires_grad},
        )
    )
    check_base(base_hash, run.adapter.base_hash, "set model.path (or weights) to that base")
    base = str(Path(source.folder).resolve()) if source else None
    return Contents(
        folder=ADAPTER,
        stem=Path(WEIGHTS).stem,
        prefix=PREFIX,
        names=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
        base_hash=base_hash,
        files={
            CONFIG: {"base_model_name_or_path": base, **config},
            BASE: {"xxh3": base_hash, "weights": base},
        },
    )
