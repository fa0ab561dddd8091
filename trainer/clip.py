"""The vision tower of a CLIP's folder: its sizes, and its weights by the names of ours."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from models.hf_config import read_config
from models.nn.vision import VisionSpec
from trainer.checkpoint.tensor_file import Entry
from trainer.parallel.pieces import named_pieces, unique_parameters
from trainer.pretrained import read_hf_config
from trainer.weights import check_entries, weight_entries

PREFIX = "vision_model."
# What a config.json of version 4 omits.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "patch_size": 32, "hidden_act": "quick_gelu",
}  # fmt: skip


def clip_spec(path: str) -> VisionSpec:
    """Read the tower's sizes; ValueError in one line for what is no CLIP."""
    folder = Path(path).expanduser()
    file = folder / "config.json"
    config = read_hf_config(folder)
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{file}: model_type={kind!r}; give the folder of a CLIP as model.vision")
    sizes = config.get("vision_config") or {} if kind == "clip" else config
    sizes = {key: value for key, value in (_DEFAULTS | sizes).items() if key != "model_type"}
    sizes["embed_dim"] = sizes.pop("hidden_size")
    try:
        return VisionSpec(**read_config(VisionSpec, sizes, {}, neutral=("projection_dim",)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {str(error).removeprefix('config.json: ')}") from None


def clip_entries(folder: Path, tower: nn.Module) -> dict[str, Entry]:
    """Match the folder's files to a planned tower; ValueError for what is missing or unknown.

    A whole CLIP's text model and projections are passed over.
    """
    entries = weight_entries(folder)
    if any(name.startswith(PREFIX) for name in entries):
        entries = {n.removeprefix(PREFIX): e for n, e in entries.items() if n.startswith(PREFIX)}
    entries = {n: e for n, e in entries.items() if not fnmatchcase(n, "*.position_ids")}
    check_entries(folder, entries, named_pieces(unique_parameters(tower)), ())
    return entries
