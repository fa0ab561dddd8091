"""A model with an adapter, ready for use: base and adapter in one set of plain weights."""

from pathlib import Path

import torch

from models.lora import merge
from models.nn.model import DecoderModel
from trainer.adapters.files import CONFIG, check_base, hash_of_files
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.parallel.materialise import materialise
from trainer.pretrained import load_causal_lm, plan_causal_lm, source_of


def base_folder(folder: Path) -> Path:
    """Return the model's own folder: of an adapter its base, else the folder itself."""
    is_adapter = (folder / CONFIG).is_file()
    return PretrainedAdapter(path=str(folder)).base if is_adapter else folder


def load_merged(
    folder: Path, *, dtype: torch.dtype, device: torch.device, attn_implementation: str = "auto"
) -> DecoderModel:
    """As `load_causal_lm`, of a model's folder or of an adapter's.

    ValueError where the adapter was trained on another base than the one its config names.
    """
    base = base_folder(folder)
    if base == folder:
        return load_causal_lm(
            folder, dtype=dtype, device=device, attn_implementation=attn_implementation
        )
    adapter = PretrainedAdapter(path=str(folder))
    spec, model = plan_causal_lm(base, dtype, attn_implementation)
    adapter.apply(model, spec.layout)
    source = source_of(base, spec, model)
    if adapter.base_hash is not None:
        advice = f"let {CONFIG} name the base that it was trained on"
        check_base(hash_of_files(source), adapter.base_hash, advice)
    values = adapter.values(model, source.values(model, spec.initializer_range, seed=0))
    materialise(model, device, values)
    merge(model)
    return model.eval()
