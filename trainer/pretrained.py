"""Models from a Hugging Face folder: its config.json decides the family, its files the weights."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.heads import CAUSAL_LM
from models.hf_config import family_of
from models.nn.backends import check_name
from models.nn.init import SkipInit
from models.nn.model import DecoderModel
from trainer.checkpoint.tensor_file import index_of, plan, tensor_bytes
from trainer.files import read_keys, write_json
from trainer.folder_model import FolderModel
from trainer.parallel.materialise import materialise
from trainer.parallel.pieces import named_pieces, unique_parameters
from trainer.weights import WeightSource, match_weights

# Keys of v4 files that others replace, and a version that would no longer be true.
REPLACED = ("rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "auto_map")
FREEZING = ("freeze_text_layers", "freeze_vision_layers", "freeze_lm_head")
CODE_KEYS = ("auto_map", "custom_pipelines", "attn_implementation", "experts_implementation")
"""Beside private ones, the keys of foreign configs that may name code."""
MAX_LAYERS = 1000  # each is built, if only to be planned
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MAX_NESTING = 16
CHUNK_TOKENS = 1024  # of a model that is loaded to be used, not trained


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json; ValueError in one line where there is none.

    Without keys that name code: transformers before 5.3 ran what a private one named, and others
    name modules of the folder or of the Hub. So they are in no config that we write, either.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder")
    config = read_keys(path)
    for key in _DEPTHS:
        if isinstance(value := config.get(key), int) and value > MAX_LAYERS:
            raise ValueError(
                f"{path}: {key}={value} is more than {MAX_LAYERS}; give another folder"
            )
    return {key: _without_code(value, 1, path) for key, value in config.items() if _is_data(key)}


def _without_code(value: Any, depth: int, path: Path) -> Any:
    if depth > _MAX_NESTING:
        raise ValueError(f"{path} nests deeper than {_MAX_NESTING}; give another folder")
    if isinstance(value, list):
        return [_without_code(item, depth + 1, path) for item in value]
    if isinstance(value, dict):
        return {k: _without_code(v, depth + 1, path) for k, v in value.items() if _is_data(k)}
    return value


def _is_data(key: str) -> bool:
    return not key.startswith("_") and key not in CODE_KEYS


def spec_from(folder: Path, *, attn_implementation: str = "auto") -> Any:
    """Return the family's spec of a Hugging Face folder; ValueError for what is not supported."""
    config = read_hf_config(folder)
    family = family_of(config, str(folder / "config.json"))
    try:
        spec = family.from_hf_config(config)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).removeprefix("config.json: ")
        raise ValueError(f"{folder / 'config.json'}: {reason}") from None
    return replace(spec, attn_implementation=attn_implementation)


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "auto",
) -> DecoderModel:
    """Return the whole model on one device, in eval mode; nothing is half-loaded.

    Raises ValueError or StorageError in one line for a folder that does not fit.
    """
    spec, model = plan_causal_lm(folder, dtype, attn_implementation)
    source = source_of(folder, spec, model)
    materialise(model, device, source.values(model, spec.initializer_range, seed=0))
    return model.eval()


def plan_causal_lm(
    folder: Path, dtype: torch.dtype, attn_implementation: str
) -> tuple[Any, DecoderModel]:
    """Return the family's spec, and the model on the meta device."""
    spec = spec_from(folder, attn_implementation=attn_implementation)
    with torch.device("meta"), SkipInit():
        model: DecoderModel = spec.build_causal_lm(chunk_tokens=CHUNK_TOKENS).to(dtype)
    return spec, model


def source_of(folder: Path, spec: Any, model: DecoderModel) -> WeightSource:
    """Match the folder's files to the planned model."""
    return match_weights(
        folder,
        model,
        trunk_name=spec.trunk_name,
        head_name=model.head_name,
        ignored=spec.ignored_weights,
    )


def save_pretrained(
    folder: Path, model: nn.Module, config: dict[str, Any], *, max_file_gb: float = 5.0
) -> None:
    """Write config.json and the weights of a whole model, as Hugging Face does: no tied aliases.

    More than `max_file_gb` (1e9 bytes) of weights are split into shards with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = named_pieces(unique_parameters(model))
    files = plan(pieces, "model", int(max_file_gb * 1e9))
    for file, header in files.headers.items():
        with open(folder / file, "wb") as stream:
            stream.write(header)
            for name, piece in pieces.items():
                if files.entries[name].file == file:
                    stream.write(tensor_bytes(piece.local))
    for name, text in index_of(files).items():
        (folder / name).write_bytes(text)
    dtype = next(iter(pieces.values())).local.dtype
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})


@dataclass(frozen=True, kw_only=True)
class PretrainedModel(FolderModel):
    """A model of a known family (Llama, Gemma, GPT-BigCode, Idefics) from its own folder."""

    path: str
    """Hugging Face folder: config.json, weights and tokenizer."""
    additional_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer gets, with rows of their own behind those of vocab_size."""
    freezes_itself: bool = True
    """An Idefics is frozen as its config.json says; false: all trains, but for what `freeze` says.
    """
    attn_implementation: str = "auto"
    """Attention back-end: auto, eager (the reference), sdpa, flex, varlen or flash."""

    def __post_init__(self) -> None:
        check_name(self.attn_implementation)
        assert self.spec is not None  # reads config.json: what is wrong there is wrong here

    @cached_property
    def spec(self) -> Any:
        folder = Path(self.path).expanduser()
        spec = spec_from(folder, attn_implementation=self.attn_implementation)
        if self.freezes_itself:
            return spec
        if not hasattr(spec, "freeze"):
            raise ValueError(
                f"model.freezes_itself=false has no effect: {folder} holds a {spec.model_type}, "
                "which freezes nothing; leave it out"
            )
        return replace(spec, **dict.fromkeys(FREEZING, False))

    @property
    def vision_folder(self) -> Path:
        """Where settings of images may be."""
        return Path(self.path).expanduser()

    def hf_config(self, head: str = CAUSAL_LM) -> dict[str, Any]:
        """Return the spec's keys over those of the folder: labels, padding token and the like."""
        config = read_hf_config(Path(self.path).expanduser())
        kept = {key: value for key, value in config.items() if key not in REPLACED}
        return {**kept, **self.spec.hf_config(head)}
