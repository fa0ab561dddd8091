"""Gemma's weights from one format into another, bit for bit: Hugging Face, Flax, DeepMind."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from models.gemma import GemmaSpec
from models.gemma_trees import from_deepmind, from_flax, to_deepmind, to_flax
from models.nn.init import SkipInit
from models.nn.model import DecoderModel
from trainer import flax_file
from trainer.errors import StorageError
from trainer.files import write_json
from trainer.parallel.materialise import materialise
from trainer.parallel.pieces import unique_parameters
from trainer.pretrained import read_hf_config, save_pretrained, spec_from
from trainer.weights import match_weights

HF, FLAX, DEEPMIND = "hf", "flax", "deepmind"
FORMATS = (HF, FLAX, DEEPMIND)
DEEPMIND_FILE = "deepmind_params.npz"
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "generation_config.json")


def convert_folder(source: Path, output: Path, to: str) -> int:
    """Write the Gemma of `source` to `output` in format `to`; return the number of tensors.

    What was written is read back and compared. Raises ValueError before anything is written, and
    StorageError for a damaged source or a copy that differs.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is unknown; set it to one of {', '.join(FORMATS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={output} exists and is not empty; give a new folder")
    spec, weights = read_weights(source)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    if to == HF and len(dtypes) > 1:
        raise ValueError(f"{source} mixes {' and '.join(dtypes)}; a model folder has one dtype")
    config = read_hf_config(source)
    tree = to_deepmind(weights, spec) if to == DEEPMIND else {}  # or refuse, before any folder
    output.mkdir(parents=True, exist_ok=True)
    if to == HF:
        save_pretrained(output, _filled(spec, weights), config)
    else:
        write_json(output / "config.json", config)
        if to == FLAX:
            flax_file.write_flax(output, to_flax(weights))
        else:
            flax_file.write_npz(output / DEEPMIND_FILE, tree)
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy(path, output)
    _compare(output, weights, read_weights(output)[1])
    return len(weights)


def read_weights(folder: Path) -> tuple[GemmaSpec, dict[str, Tensor]]:
    """Return spec and weights by torch's names, in the file's dtype, whatever format they are in.

    Raises ValueError or StorageError in one line for a folder that does not fit.
    """
    spec = spec_from(folder)
    if not isinstance(spec, GemmaSpec):
        raise ValueError(
            f"{folder} holds a {spec.model_type}; only Gemma has Flax and DeepMind weights"
        )
    try:
        if (folder / flax_file.SINGLE).is_file() or (folder / flax_file.INDEX).is_file():
            return spec, from_flax(flax_file.read_flax(folder), spec)
        if (folder / DEEPMIND_FILE).is_file():
            return spec, from_deepmind(flax_file.read_npz(folder / DEEPMIND_FILE), spec)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return spec, _read_hf(folder, spec)


def _planned(spec: GemmaSpec) -> DecoderModel:
    with torch.device("meta"), SkipInit():
        return spec.build_causal_lm(chunk_tokens=1)


def _read_hf(folder: Path, spec: GemmaSpec) -> dict[str, Tensor]:
    model = _planned(spec)
    source = match_weights(
        folder,
        model,
        trunk_name=spec.trunk_name,
        head_name=model.head_name,
        ignored=spec.ignored_weights,
    )
    value = source.values(model, spec.initializer_range, seed=0)
    return {
        name: value(name, 0, parameter.numel()).view(parameter.shape)
        for name, parameter in unique_parameters(model)
    }


def _filled(spec: GemmaSpec, weights: dict[str, Tensor]) -> DecoderModel:
    """Return the torch model that holds these weights."""

    def value(name: str, start: int, stop: int) -> Tensor:
        return weights[name].reshape(-1)[start:stop]

    model = _planned(spec).to(next(iter(weights.values())).dtype)
    materialise(model, torch.device("cpu"), value)
    return model


def _compare(output: Path, weights: dict[str, Tensor], copies: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        copy = copies[name]
        is_same = copy.dtype == weight.dtype and torch.equal(
            copy.reshape(-1).view(torch.uint8), weight.reshape(-1).contiguous().view(torch.uint8)
        )
        if not is_same:
            raise StorageError(f"{output}: {name} was written but reads back otherwise; try again")
