"""What transformers makes of a folder: a config and a causal LM, or why they cannot train here.

The home of its model classes.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from trainer.pretrained import read_hf_config

HEAD = "lm_head"
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers")


def read_config(folder: Path) -> Any:
    """Return transformers' config of a folder; ValueError for one of no causal LM of text alone.

    Code that the folder brings is never run.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    path, given = folder / "config.json", read_hf_config(folder)
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own = " (its folder brings code, which is never run)" if any(folder.glob("*.py")) else ""
        raise ValueError(
            f"{path}: model_type={model_type!r} is no model of transformers{own}; give the folder "
            "of one that is, or upgrade transformers"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(given)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: {message}; give another folder") from None
    for name in NEEDED:
        if getattr(config, name, None) is None:
            raise ValueError(
                f"{path}: model_type={model_type!r} has no {name} of its own, as a model that "
                "takes more than text; give the folder of one that takes text alone"
            )
    return config


def construct(config: Any, attn_implementation: str) -> Any:
    """Return transformers' model; ValueError where it is no causal LM, or its head has no name."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    except ValueError as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model_type={config.model_type!r} is no causal LM that transformers can build: "
            f"{message}; give another folder"
        ) from None
    if getattr(getattr(model, HEAD, None), "weight", None) is None:
        raise ValueError(
            f"model_type={config.model_type!r} has no {HEAD}.weight: its head goes by another "
            "name; train another family"
        )
    return model


@cache
def refuse_mixing(folder: str, attn_implementation: str) -> None:
    """Raise ValueError where a document's logits depend on its neighbour in a packed row.

    Tried on one layer of each kind with random weights: a matter of the code, not of the weights.
    """
    config = _shrunk(read_hf_config(Path(folder)), read_config(Path(folder)))
    with torch.device("cpu"), torch.no_grad():  # a caller may plan on the meta device
        model = construct(config, attn_implementation).eval().double()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
        ids = torch.randint(0, config.vocab_size, (1, 24), generator=generator)
        positions = torch.arange(12).repeat(2)[None]
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 12:]
        alone = model(input_ids=ids[:, 12:], position_ids=positions[:, 12:], use_cache=False).logits
    if (packed - alone).abs().max() > 1e-5 * alone.abs().max():
        raise ValueError(
            f"model_type={config.model_type!r} lets packed documents see each other in "
            "transformers; train another family"
        )


def _shrunk(given: dict[str, Any], config: Any) -> Any:
    """Return the config with a small vocabulary and one layer of each kind."""
    from transformers import AutoConfig

    kinds = list(dict.fromkeys(given.get("layer_types") or ["any"]))
    names = getattr(config, "attribute_map", {})
    values = {**given, names.get("num_hidden_layers", "num_hidden_layers"): max(2, len(kinds))}
    if kinds != ["any"]:
        values["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
    values[names.get("vocab_size", "vocab_size")] = min(256, config.vocab_size)
    for key in [key for key in values if key.endswith("_token_id")]:
        values[key] = None
    model_type = values.pop("model_type")
    return AutoConfig.for_model(model_type, **values)
