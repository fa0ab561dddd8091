"""Virtual tokens: ids behind a model's vocabulary, on its input side alone, whose rows train.

Source: Lester et al. 2021 (prompt tuning).
"""

import torch
from torch import nn

from models.nn.decoder import ScaledEmbedding
from models.nn.decoupled import DecoupledEmbedding, enlarged
from models.nn.init import SkipInit

ROWS = ".additional_embedding.weight"


class PromptEmbedding(DecoupledEmbedding):
    """Its additional rows are virtual tokens: no logit belongs to them, and nothing scales them."""

    scales_additional = False  # peft puts them behind the embedding, whatever that computes


def add_prompt(model: nn.Module, embedding: str, count: int) -> None:
    """Put `count` virtual tokens behind a model's vocabulary, in place.

    What the model has keeps its names; the head stays as it is, tied or not. ValueError for an
    embedding that computes more than rows of a table, or has additional rows already.
    """
    old = model.get_submodule(embedding)
    if getattr(old, "has_additional", False):
        raise ValueError(
            "adapter=prompt: the model has additional rows already, where virtual tokens would be; "
            "take out model.additional_tokens, or set adapter=lora"
        )
    if type(old) not in (nn.Embedding, ScaledEmbedding, DecoupledEmbedding):
        raise ValueError(
            f"adapter=prompt: virtual tokens cannot be put beside {embedding}, a "
            f"{type(old).__name__} that computes in a way of its own; set adapter=lora"
        )
    assert isinstance(old, nn.Embedding)
    with torch.device(old.weight.device), SkipInit():
        new = enlarged(PromptEmbedding, old, count)
    model.set_submodule(embedding, new)


def prompt_rows(model: nn.Module) -> list[str]:
    """Return the name of the virtual tokens' parameter, where there are some."""
    modules = model.named_modules()
    return [f"{name}{ROWS}" for name, module in modules if isinstance(module, PromptEmbedding)]


def virtual_ids(model: nn.Module) -> range:
    """Return the ids of the virtual tokens of a whole model, not of a part; empty: it has none."""
    for module in model.modules():
        if isinstance(module, PromptEmbedding):
            first = module.num_embeddings
            return range(first, first + module.additional_embedding.num_embeddings)
    return range(0)
