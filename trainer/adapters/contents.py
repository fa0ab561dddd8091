"""What of a run's weights goes into its checkpoints: all, or what trains beside a base."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from trainer.adapters.files import (
    CONFIG,
    WEIGHTS,
    check_base,
    hash_of_files,
    hash_of_seed,
    names_in_file,
)
from trainer.adapters.nf4 import packing_of
from trainer.checkpoint.contents import BASE, TRAINED, Contents, is_trained_alone
from trainer.distributed import Ranks
from trainer.run import Run
from trainer.weights import WeightSource

ADAPTER = "adapter"


def contents_of(run: Run, ranks: Ranks) -> Contents:
    """Return what to save of the model: all of it, or what ever trains beside a frozen base.

    ValueError where what a run starts from belongs to another base. Collective.
    """
    model = run.trained_model(run.freeze.last_phase)
    config = run.adapter.peft_config(model)
    is_alone = is_trained_alone(run.checkpoint.contents, new_tokens=run.freeze.new_tokens)
    if config is None and not is_alone:
        return Contents()
    source = run.weight_source(model)
    if config is not None and source is not None and source.base_hash is not None:
        raise ValueError(
            f"weights={source.folder} and an adapter would be saved without what was trained "
            "before; export the checkpoint first, and give that folder as model.path"
        )
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    if source and not source.is_seeded:
        trained |= frozenset(source.fresh)  # what no file holds, though it may be frozen
    base_hash = _hash(run, model, source, trained if config is None else frozenset(), ranks)
    stated = run.adapter.base_hash or (source.base_hash if source else None)
    check_base(base_hash, stated, "set model.path (or weights) to that base")
    base = str(Path(source.folder).resolve()) if source and not source.is_seeded else None
    kept = packing_of(model)
    stated_base = {"xxh3": base_hash, "weights": base, **(kept.settings if kept else {})}
    if source and source.assembled:
        stated_base["assembled"] = {n: p and str(p) for n, p in source.assembled.items()}
    files = {BASE: stated_base}
    if config is None:
        return Contents(
            folder=TRAINED, stem=TRAINED, names={name: name for name in trained},
            base_hash=base_hash, files=files,
        )  # fmt: skip
    files[CONFIG] = {"base_model_name_or_path": base, **config}
    return Contents(
        folder=ADAPTER, stem=Path(WEIGHTS).stem, names=names_in_file(model, trained),
        base_hash=base_hash, files=files,
    )  # fmt: skip


def _hash(
    run: Run,
    model: nn.Module,
    source: WeightSource | None,
    trained: frozenset[str],
    ranks: Ranks,
) -> str:
    """Return the hash of the base; `trained` of its tensors are no part of it. Collective."""
    if source is not None and not source.is_seeded:
        kept = {name: entry for name, entry in source.entries.items() if name not in trained}
        return hash_of_files(replace(source, entries=kept), ranks)
    return hash_of_seed(
        seed=run.seed,
        std=run.model.initializer_range,
        shapes={n: list(p.shape) for n, p in model.named_parameters() if not p.requires_grad},
    )
