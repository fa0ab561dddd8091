"""A model with an adapter, ready for use: base and adapter in one set of plain weights."""

from pathlib import Path
from typing import Any

import torch

from models.lora import merge
from models.nn.model import DecoderModel
from trainer.adapters.files import CONFIG, check_base, hash_of_files
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.parallel.materialise import materialise
from trainer.planned import plan_model
from trainer.pretrained import plan_causal_lm, read_hf_config, source_of


def base_folder(folder: Path) -> Path:
    """Return the model's own folder: of an adapter its base, else the folder itself."""
    is_adapter = (folder / CONFIG).is_file()
    return PretrainedAdapter(path=str(folder)).base if is_adapter else folder


def config_of(folder: Path) -> dict[str, Any]:
    """Return the model's config.json: an adapter's folder of ours has one, others' their base's."""
    is_own = (folder / "config.json").is_file()
    return read_hf_config(folder if is_own else base_folder(folder))


def load_merged(
    folder: Path, *, dtype: torch.dtype, device: torch.device, attn_implementation: str = "auto"
) -> DecoderModel:
    """As `load_causal_lm`, of a model's folder or of an adapter's.

    ValueError where the adapter was trained on another base than the one its config names.
    """
    spec_and_model = plan_causal_lm(base_folder(folder), dtype, attn_implementation)
    model = _filled(folder, *spec_and_model, device)
    merge(model)
    return model


def load_as_trained(folder: Path, *, dtype: torch.dtype, device: torch.device) -> DecoderModel:
    """Return the model with its adapter beside it, under the head that config.json names.

    Also of families that are not ours; `merge` makes it one set of weights. Errors of load_merged.
    """
    planned = plan_model(base_folder(folder), config_of(folder), dtype, attn_implementation="eager")
    return _filled(folder, *planned, device)


def _filled(folder: Path, spec: Any, model: DecoderModel, device: torch.device) -> DecoderModel:
    """Fill the planned model of `folder` with the weights there, and those of its base."""
    base = base_folder(folder)
    adapter = PretrainedAdapter(path=str(folder)) if base != folder else None
    if adapter is not None:
        adapter.apply(model, spec.layout)
    source = source_of(base, spec, model)
    if adapter is not None and adapter.base_hash is not None:
        advice = f"let {CONFIG} name the base that it was trained on"
        check_base(hash_of_files(source), adapter.base_hash, advice)
    given = adapter.entries if adapter is not None else {}
    if absent := [name for name in source.fresh if name not in given]:
        raise ValueError(f"{folder} has no {absent[0]}, which its config.json promises; train it")
    values = source.values(model, spec.initializer_range, seed=0)
    materialise(model, device, adapter.values(model, values) if adapter is not None else values)
    return model.eval()
