"""The model of a Hugging Face folder with the head that its config.json names, to be used."""

from pathlib import Path
from typing import Any

import torch

from models.heads import CAUSAL_LM, SEQUENCE, TOKEN, sequence_classifier, token_classifier
from models.hf_config import FAMILIES
from models.nn.init import SkipInit
from models.nn.model import DecoderModel
from trainer.pretrained import CHUNK_TOKENS, spec_from

_ENDINGS = {"ForSequenceClassification": SEQUENCE, "ForTokenClassification": TOKEN}


def head_of(config: dict[str, Any]) -> str:
    """Return the head of a config.json by its `architectures`; a language model's by default."""
    name = str((config.get("architectures") or [""])[0])
    return next((head for end, head in _ENDINGS.items() if name.endswith(end)), CAUSAL_LM)


def plan_model(
    folder: Path, config: dict[str, Any], dtype: torch.dtype, attn_implementation: str
) -> tuple[Any, DecoderModel]:
    """Return the spec of `folder`, and the model on the meta device with the head of `config`.

    `config` is that of an adapter's folder where the head came with the adapter. A model of a
    family that is not ours is transformers' own. ValueError for a head that cannot be built.
    """
    spec, head = _spec(folder, config, attn_implementation), head_of(config)
    if head != CAUSAL_LM and not hasattr(spec, "build_trunk"):
        raise ValueError(
            f"{folder} is a {config.get('model_type')} with a head for {head}, and the families "
            f"that take one here are {', '.join(FAMILIES)}; give a model of one of them"
        )
    num_labels = len(config.get("id2label") or ()) or 2  # two is what transformers leaves unsaid
    with torch.device("meta"), SkipInit():
        if head == SEQUENCE:
            kind = config.get("problem_type") or "single_label_classification"
            model = sequence_classifier(spec, num_labels=num_labels, problem_type=kind)
        elif head == TOKEN:
            model = token_classifier(spec, num_labels=num_labels)
        else:
            model = spec.build_causal_lm(chunk_tokens=CHUNK_TOKENS)
    return spec, model.to(dtype)


def _spec(folder: Path, config: dict[str, Any], attn_implementation: str) -> Any:
    if config.get("model_type") in FAMILIES:
        return spec_from(folder, attn_implementation=attn_implementation)
    from trainer.hf_auto import HFAutoModel

    return HFAutoModel(path=str(folder), attn_implementation=attn_implementation)
