"""The images of a run: as its model takes them."""

from dataclasses import replace
from typing import Any

from models.heads import CausalLMSpec
from trainer.data.protocol import DataSpec


def fitted(data: DataSpec, model: CausalLMSpec) -> DataSpec:
    """Return data whose images are as the model takes them; data without images as it is.

    ValueError where the model looks at none, or its size and the settings of images differ.
    """
    if data.image_size is None:
        return data
    vision = getattr(family_of(model), "vision_config", None)
    if vision is None:
        raise ValueError(
            "data=vision_text has images, and the model looks at none; set model=idefics_tiny, or "
            "model=idefics model.text to the folder of a Llama, or model=pretrained model.path to "
            "that of an Idefics"
        )
    images: Any = data
    folder = getattr(model, "vision_folder", None)
    return replace(images, processor=images.processor.fitted(vision.image_size, folder))


def family_of(model: CausalLMSpec) -> Any:
    """Return the spec of a model's family, which a folder's model holds."""
    return getattr(model, "spec", model)
