"""Images that a prompt is about: where they stand in it, their pixels, and who looks at them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.data.examples import BadRowError
from trainer.data.images.files import ImageFiles
from trainer.data.images.mask import latest_image
from trainer.data.images.processor import FILE, ImageProcessor
from trainer.data.images.references import ImageReference
from trainer.data.images.tokens import IMAGE, check_blocks, image_tokens
from trainer.data.tokenizers import Tokenizer
from trainer.decoder import PromptImages


def placed(text: str, num_images: int) -> str:
    """Return a prompt with a place for each image: in front of it, unless it says <image> itself.

    ValueError where it says so more or less often.
    """
    places = text.count(IMAGE)
    if places not in (0, num_images):
        raise ValueError(
            f"the prompt has {places} places for images ({IMAGE}), and image= names {num_images}; "
            "make them as many, or write none: images then come first"
        )
    return text if places else IMAGE * num_images + text


def read_image(path: Path) -> Image.Image:
    """Return an image within the limits of data on bytes and pixels, as RGB; ValueError: none."""
    real = Path(os.path.realpath(path))
    try:
        return ImageFiles(real.parent).read(ImageReference(file=real.name))
    except BadRowError as error:  # its advice is about rows
        reason = str(error).partition(";")[0]
        raise ValueError(f"image={path} {reason}; give another file") from None


def processor_of(spec: Any, *folders: Path) -> ImageProcessor:
    """Return what makes pixels for the model of `spec`, by the first folder that says how."""
    own = next((folder for folder in folders if (folder / FILE).is_file()), None)
    return ImageProcessor().fitted(spec.vision_config.image_size, own)


def prompt_images(
    images: Sequence[Image.Image], ids: list[int], tokenizer: Tokenizer, processor: ImageProcessor
) -> PromptImages:
    """Return the images of one prompt, whose ids hold a block for each of them.

    ValueError where they do not, or where its last token looks at none: no answer then would.
    """
    tokens, row = image_tokens(tokenizer), np.array(ids, np.int64)
    try:
        check_blocks(row, tokens, len(images))
    except BadRowError as error:
        raise ValueError(str(error)) from None
    sees = latest_image(row, np.ones_like(row), tokens.image, tokenizer.eos_token_id)
    if sees[-1] < 0:
        raise ValueError(
            "the prompt ends behind an EOS, from where Idefics sees no image any more; take the "
            "EOS out of it, or of the chat template"
        )
    pixels = np.stack([processor(image) for image in images])
    mask = (sees[:, None] == np.arange(len(images))).astype(np.int64)
    return PromptImages(torch.from_numpy(pixels)[None], torch.from_numpy(mask)[None])
