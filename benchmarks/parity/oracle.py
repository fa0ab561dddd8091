"""Tiny models of every family with random weights, and the same in transformers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models import heads
from models.gemma import GemmaSpec
from models.gpt_bigcode import GPTBigCodeSpec
from models.idefics import IdeficsSpec
from models.llama import LlamaSpec
from models.nn.init import Init, initial_values, initializers

VOCAB, LABELS = 131, 3


def specs() -> dict[str, Any]:
    """Return a tiny spec of each family and variant that the table lists."""
    decoder: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    bigcode: dict[str, Any] = {
        "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    return {
        "Llama": LlamaSpec(**decoder),
        "Gemma": GemmaSpec(**decoder, head_dim=16),
        "GPT-BigCode (MQA)": GPTBigCodeSpec(**bigcode, multi_query=True),
        "GPT-BigCode (MHA)": GPTBigCodeSpec(**bigcode, multi_query=False),
        "Idefics": _idefics(decoder),
    }


def _idefics(decoder: dict[str, Any]) -> IdeficsSpec:
    config = {key: value for key, value in decoder.items() if key != "num_key_value_heads"}
    vision = {
        "embed_dim": 24, "image_size": 12, "intermediate_size": 32, "patch_size": 6,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    perceiver = {
        "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 1,
        "resampler_n_heads": 2, "resampler_head_dim": 8,
    }  # fmt: skip
    return IdeficsSpec.from_hf_config(
        {
            **config, "model_type": "idefics", "additional_vocab_size": 2, "use_resampler": True,
            "cross_layer_interval": 1, "qk_layer_norms": True, "alpha_initializer": "ones",
            "freeze_text_layers": False, "freeze_vision_layers": False,
            "vision_config": vision, "perceiver_config": perceiver,
        }
    )  # fmt: skip


def built(spec: Any, head: str = heads.CAUSAL_LM) -> Any:
    """Return the model in eval mode, with weights large enough that every part matters."""
    spec = replace(spec, attn_implementation="eager")
    if head == heads.SEQUENCE:
        model = heads.sequence_classifier(
            spec, num_labels=LABELS, problem_type="single_label_classification"
        )
    elif head == heads.TOKEN:
        model = heads.token_classifier(spec, num_labels=LABELS)
    else:
        model = spec.build_causal_lm(chunk_tokens=16)
    inits = initializers(model, 0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = initial_values(name, inits[name], 1, 0, parameter.numel())
            noise = initial_values(f"{name}+", Init(std=0.1), 1, 0, parameter.numel())
            parameter.copy_((values + noise).view(parameter.shape))
    return model.eval()


def theirs(spec: Any, model: nn.Module, head: str = heads.CAUSAL_LM) -> Any:
    """Return transformers' model of the same config and weights, in eval mode."""
    import transformers

    config = spec.hf_config(head)
    (architecture,) = config.pop("architectures")
    if head != heads.CAUSAL_LM:
        config |= {"num_labels": LABELS, "pad_token_id": 0}
    loaded = transformers.AutoConfig.for_model(**config)
    result = getattr(transformers, architecture)._from_config(loaded, attn_implementation="eager")
    missing, unexpected = result.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return result.eval()


def has_oracle(spec: Any, head: str) -> bool:
    return head in spec.architectures


def inputs(spec: Any, batch: int = 2, length: int = 18) -> dict[str, Tensor]:
    """Return ids, positions and segments of full rows, and images where the family has them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    found = {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(batch, -1),
        "segment_ids": torch.ones_like(ids),
    }
    if spec.model_type == "idefics":
        size = spec.vision_config.image_size
        found["pixel_values"] = torch.randn((batch, 2, 3, size, size), generator=generator)
        mask = torch.zeros(batch, length, 2, dtype=torch.int64)
        mask[:, 3:9, 0], mask[:, 9:, 1] = 1, 1
        found["image_attention_mask"] = mask
    return found


def their_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Return the same for transformers: a mask of real tokens in place of segments."""
    others = {key: value for key, value in batch.items() if key != "segment_ids"}
    return {**others, "attention_mask": (batch["segment_ids"] > 0).long(), "use_cache": False}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    difference = (found.detach() - expected.detach()).abs().max()
    return (difference / expected.detach().abs().max().clamp(min=1e-12)).item()
