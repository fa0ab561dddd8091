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
from trainer.pretrained import load_causal_lm, plan_causal_lm, read_hf_config, source_of


def base_folder(folder: Path) -> Path:
    """Return the model's own folder: of an adapter its base, else the folder itself."""
    is_adapter = (folder / CONFIG).is_file()
    return PretrainedAdapter(path=str(folder)).base if is_adapter else folder


def config_of(folder: Path) -> dict[str, Any]:
    """Return the model's config.json: an adapter's folder of ours has one, others' their base's."""
    is_own = (folder / "config.json").is_file()
    return read_hf_config(folder if is_own else base_folder(folder))


def load_merged(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "auto",
    has_head: bool = False,
) -> DecoderModel:
    """As `load_causal_lm`, of a model's folder or of an adapter's.

    With `has_head`, under the head that its config.json names, of families that are not ours too.
    ValueError where the adapter was trained on another base than the one its config names.
    """
    base = base_folder(folder)
    if base == folder and not has_head:
        return load_causal_lm(
            folder, dtype=dtype, device=device, attn_implementation=attn_implementation
        )
    if has_head:
        spec, model = plan_model(base, config_of(folder), dtype, attn_implementation)
    else:
        spec, model = plan_causal_lm(base, dtype, attn_implementation)
    adapter = PretrainedAdapter(path=str(folder)) if base != folder else None
    if adapter is not None:
        adapter.apply(model, spec.layout)
    source = source_of(base, spec, model)
    values = source.values(model, spec.initializer_range, seed=0)
    if adapter is not None:
        if adapter.base_hash is not None:
            advice = f"let {CONFIG} name the base that it was trained on"
            check_base(hash_of_files(source), adapter.base_hash, advice)
        values = adapter.values(model, values)
    known = adapter.entries if adapter is not None else {}
    if absent := [name for name in source.fresh if name not in known]:
        raise ValueError(f"{folder} has no {absent[0]}, which its config.json promises; train it")
    materialise(model, device, values)
    merge(model)
    return model.eval()
