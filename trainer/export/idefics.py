"""An exported Idefics: what transformers can express of ours, and images to compare on."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IDEFICS = "idefics"


def check_idefics(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a config.json of ours that transformers' Idefics cannot express."""
    if config.get("model_type") != IDEFICS:
        return
    own, layers = config["hidden_size"] // config["num_attention_heads"], "num_hidden_layers"
    interval = config.get("cross_layer_interval", 1)
    lacks = {
        "attention_bias=true": config.get("attention_bias"),
        "mlp_bias=true": config.get("mlp_bias"),
        f"head_dim={config.get('head_dim')}": config.get("head_dim") not in (None, own),
        f"{layers}={config.get(layers)} for cross_layer_interval={interval}, which does not "
        "divide it": config.get(layers, 0) % interval,
    }
    for what, is_there in lacks.items():
        if is_there:
            raise ValueError(
                f"{folder} has {what}: transformers' Idefics cannot compute that; use the "
                "checkpoint as it is, with tessera evaluate and model.path"
            )


@torch.no_grad()
def spread_heads(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Give each query head of an Idefics key and value heads of its own, in place.

    Returns the config.json of that: the same numbers, as transformers, which knows no shared heads,
    can read them. Of other models nothing changes.
    """
    shared = config.get("num_key_value_heads")
    if config.get("model_type") != IDEFICS or shared is None:
        return config
    times = config["num_attention_heads"] // shared
    size = config["hidden_size"] // config["num_attention_heads"]
    for layer in model.get_submodule("model.layers").children():
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            linear: Any = layer.get_submodule(name)
            heads = linear.weight.unflatten(0, (-1, size)).repeat_interleave(times, dim=0)
            linear.weight = nn.Parameter(heads.flatten(0, 1), requires_grad=False)
            linear.out_features = linear.weight.shape[0]
    return {key: value for key, value in config.items() if key != "num_key_value_heads"}


def images_beside(config: dict[str, Any], num_tokens: int) -> dict[str, Tensor]:
    """Return what an Idefics is asked with beside a text: an image, seen by its second half.

    Always the same; empty for other models.
    """
    if config.get("model_type") != IDEFICS:
        return {}
    vision = config.get("vision_config") or {}
    side, channels = vision.get("image_size", 224), vision.get("num_channels", 3)
    pixels = torch.randn(1, 1, channels, side, side, generator=torch.Generator().manual_seed(0))
    is_seen = torch.arange(num_tokens) >= num_tokens // 2
    return {"pixel_values": pixels, "image_attention_mask": is_seen.long()[None, :, None]}


def copy_image_settings(folder: Path, target: Path) -> None:
    """Copy what says how images become pixels, where a folder has it."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        shutil.copy(path, target)


def num_logits(config: dict[str, Any]) -> int:
    """Return how many tokens a language model writes."""
    return int(config["vocab_size"]) + int(config.get("additional_vocab_size") or 0)
