"""A model with what trained beside it, ready for use: all of it in one set of plain weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.lora import merge
from models.nn.decoupled import add_rows, merge_rows
from models.nn.init import SkipInit
from models.nn.model import DecoderModel
from trainer.adapters.files import CONFIG, check_base, hash_of_files
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.adapters.prompt import prompt_of
from trainer.checkpoint.contents import BASE
from trainer.checkpoint.tensor_file import read_entries
from trainer.files import read_keys
from trainer.parallel.materialise import materialise
from trainer.planned import plan_model
from trainer.pretrained import plan_causal_lm, read_hf_config, source_of, spec_from
from trainer.weights import match_base, stated_base

NEW_ROWS = ".additional_embedding.weight"


def base_folder(folder: Path) -> Path:
    """Return the model's own folder: of what trained beside a base the base, else the folder."""
    if (folder / CONFIG).is_file():
        return PretrainedAdapter(path=str(folder)).base
    return stated_base(folder) if (folder / BASE).is_file() else folder


def config_folder(folder: Path) -> Path:
    """Return the folder whose config.json is that of the base: an assembled one is in no other."""
    path = folder / BASE
    is_assembled = path.is_file() and "assembled" in read_keys(path)
    return folder if is_assembled else base_folder(folder)


def merged_spec(folder: Path) -> Any:
    """Return the family's spec of what `load_merged` loads: new rows count as vocabulary."""
    spec = spec_from(config_folder(folder))
    return replace(spec, vocab_size=spec.vocab_size + _num_new_rows(folder, spec))


def _num_new_rows(folder: Path, spec: Any) -> int:
    """Return how many rows of `folder` the model has not by itself."""
    if getattr(spec, "additional_vocab_size", 0):
        return 0  # its own
    entries = read_entries(folder).items()
    return next((entry.shape[0] for name, entry in entries if name.endswith(NEW_ROWS)), 0)


def num_virtual_tokens(folder: Path) -> int:
    """Return how many virtual tokens stand before every text that the model of `folder` reads."""
    if not (folder / CONFIG).is_file():
        return 0
    prompt = prompt_of(PretrainedAdapter(path=str(folder)))
    return prompt.num_virtual_tokens if prompt else 0


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
    has_rows_apart: bool = False,
) -> DecoderModel:
    """As `load_causal_lm`, of a model's folder, an adapter's, or a checkpoint's `trained`.

    New rows become part of embedding and head, or with `has_rows_apart` stay `additional_*` beside
    them; virtual tokens stay ids behind the vocabulary. A base that was kept in few bits is merged
    as those rounded it: that is what trained. ValueError where what trained belongs to another base
    than the one that it names.
    """
    spec_and_model = plan_causal_lm(config_folder(folder), dtype, attn_implementation)
    model = _filled(folder, *spec_and_model, device)
    merge(model)
    if not has_rows_apart:
        merge_rows(model)
    return model


def load_as_trained(folder: Path, *, dtype: torch.dtype, device: torch.device) -> DecoderModel:
    """Return the model with adapter and new rows beside it, under the head that config.json names.

    Also of families that are not ours. `merge` and `merge_rows` make it one set of weights. Errors
    of load_merged.
    """
    config = config_of(folder)
    planned = plan_model(config_folder(folder), config, dtype, attn_implementation="eager")
    return _filled(folder, *planned, device)


def _filled(folder: Path, spec: Any, model: DecoderModel, device: torch.device) -> DecoderModel:
    """Fill the planned model of `folder` with the weights there, and those of its base."""
    if count := _num_new_rows(folder, spec):
        with torch.device("meta"), SkipInit():
            add_rows(model, spec.layout.embedding, count)
    adapter = PretrainedAdapter(path=str(folder)) if (folder / CONFIG).is_file() else None
    if adapter:
        adapter.apply(model, spec.layout)
    own = base_folder(folder) if adapter else folder
    source = (match_base(folder, model) if adapter else None) or source_of(own, spec, model)
    stated = adapter.base_hash if adapter else source.base_hash
    if stated is not None:
        kept = {name: entry for name, entry in source.entries.items() if name not in source.own}
        advice = f"let {CONFIG if adapter else BASE} name the base that it was trained on"
        check_base(hash_of_files(replace(source, entries=kept)), stated, advice)
    given = adapter.given(model) if adapter else {}
    if absent := [name for name in source.fresh if name not in given]:
        raise ValueError(f"{folder} has no {absent[0]}, which its config.json promises; train it")
    values = source.values(model, spec.initializer_range, seed=0)
    materialise(model, device, adapter.values(model, values) if adapter else values)
    return model.eval()
