"""What an Idefics is assembled from: a tiny Llama, a tiny CLIP of transformers; and its rows."""

from pathlib import Path
from typing import Any

import torch

from models.llama import LlamaSpec
from models.nn.resampler import PerceiverSpec
from models.nn.rope import RopeParameters
from models.nn.vision import VisionSpec
from tests.conftest import tiny_spec, write_model
from tests.images import mixed_rows, write_pictures, write_rows
from trainer.assembled import AssembledIdefics
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import VisionTextData

SIDE = 12
SIZES: dict[str, Any] = {
    "image_size": SIDE, "patch_size": 6, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
TOWER = VisionSpec(**SIZES, embed_dim=24)
RESAMPLER = PerceiverSpec(
    resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8
)


def write_text_model(folder: Path, **changes: Any) -> LlamaSpec:
    """Write what SmolLM2 is in small: tied, with shared key heads and another rotary base."""
    settings: dict[str, Any] = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": RopeParameters(rope_theta=100_000.0),
    }  # fmt: skip
    spec = tiny_spec(**settings | changes)
    write_model(folder, spec, seed=3)
    return spec


def write_clip(folder: Path, *, is_whole: bool = False) -> Any:
    """Write a random CLIP of transformers, its tower alone or all; return the tower."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES, hidden_size=24, initializer_range=0.2)
    if not is_whole:
        tower = CLIPVisionModel(config)
        tower.save_pretrained(folder)
        return tower.eval()
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 9, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=config.to_dict()))
    model.save_pretrained(folder)
    return model.vision_model.eval()


def assembled(text: Path, **changes: Any) -> AssembledIdefics:
    settings: dict[str, Any] = {"vision": TOWER, "perceiver_config": RESAMPLER} | changes
    return AssembledIdefics(text=str(text), **settings)


def vision_data(folder: Path) -> VisionTextData:
    """Write rows with and without images; return their data, of images as the model takes them."""
    rows = mixed_rows(write_pictures(folder, 7), 30)
    return VisionTextData(
        path=write_rows(folder / "rows.jsonl", rows), encoder=VisionTextEncoder(), row_tokens=64,
        row_images=4, global_documents=8, micro_rows=2, cache=str(folder / "cache"),
    )  # fmt: skip
