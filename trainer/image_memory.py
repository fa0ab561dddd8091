"""Which model may remember what it says of images: `freeze.image_cache_gib`."""

from torch import nn

from models.nn.image_memory import ImageMemory
from models.nn.vision_text import VisionTextTrunk

KEY = "freeze.image_cache_gib"


def remember_images(model: nn.Module, gib: float) -> None:
    """Let a planned model, frozen as it is trained, keep what its tower says of images, in place.

    ValueError where it has no tower, or the tower does not always say the same.
    """
    if not 0 < gib < float("inf"):
        raise ValueError(f"{KEY}={gib} is not positive; set it to 1, or leave it out")
    trunk = getattr(model, "trunk", None)
    if not isinstance(trunk, VisionTextTrunk):
        raise ValueError(f"{KEY}={gib} has no effect on a model without images; leave it out")
    tower = trunk.vision_model
    if trained := [name for name, weight in tower.named_parameters() if weight.requires_grad]:
        raise ValueError(
            f"{KEY}={gib} keeps what a frozen tower says, and vision_model.{trained[0]} trains; "
            "set model.freeze_vision_layers=true, or leave it out"
        )
    dropout = max(getattr(module, "dropout", 0.0) for module in tower.modules())
    if dropout:
        raise ValueError(
            f"{KEY}={gib}: with vision_config.attention_dropout={dropout} the tower never says the "
            "same twice; set it to 0, or leave the cache out"
        )
    is_resampled = trunk.has_resampler and not any(
        weight.requires_grad for weight in trunk.perceiver_resampler.parameters()
    )
    trunk.image_memory = ImageMemory(int(gib * 2**30), is_resampled=is_resampled)


def check_memory(model: nn.Module, settings: dict[str, bool]) -> None:
    """Raise ValueError where a model that remembers images meets a setting that is on."""
    found = [name for name, is_on in settings.items() if is_on]
    trunk = getattr(model, "trunk", None)
    if found and getattr(trunk, "image_memory", None) is not None:
        raise ValueError(
            f"{found[0]} with {KEY}: ranks ask their towers for other images, so each needs a "
            "whole one; use engine=native or accelerate with mesh=ddp, or leave the cache out"
        )
