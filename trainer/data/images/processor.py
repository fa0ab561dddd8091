"""RGB images to the numbers that a vision tower reads, as transformers' IdeficsImageProcessor."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.files import read_keys

FILE = "preprocessor_config.json"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, as in Idefics
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE = 1 / 255
# What the file may say beside sizes, mean and deviation: what is done here anyway.
_FIXED = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "resample": int(Image.Resampling.BICUBIC), "image_num_channels": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resize (bicubic, whatever the shape was), rescale to 0 .. 1, normalise."""

    path: str | None = None
    """Folder with a preprocessor_config.json, which says the rest; None: the settings below."""
    image_size: int = 224
    """Height and width that the model reads, in pixels."""
    image_mean: tuple[float, float, float] = MEAN
    """Of red, green and blue, 0 to 1."""
    image_std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} is not positive; set it to 224")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} is not positive; correct it")
        own = (self.image_size, self.image_mean, self.image_std)
        if self.path is not None and own != (224, MEAN, STD):
            raise ValueError(
                f"data.processor.path={self.path} says all settings of images; leave the others out"
            )

    @cached_property
    def resolved(self) -> "ImageProcessor":
        """The settings that count; ValueError for a file that asks for what is not done here."""
        return self if self.path is None else from_folder(Path(self.path).expanduser())

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return (3, image_size, image_size) float32 of an RGB image."""
        side = self.image_size
        resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        # In transformers' order of types, so that the bits are the same.
        scaled_HWC = (resized.astype(np.float64) * SCALE).astype(np.float32)
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        return np.ascontiguousarray(((scaled_HWC - mean) / std).transpose(2, 0, 1))


def from_folder(folder: Path) -> ImageProcessor:
    """Read a folder's preprocessor_config.json, of transformers 4 or 5."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"data.processor.path={folder} has no {FILE}; give a folder that has one, or leave "
            "the path out and set data.processor.image_size"
        )
    keys = read_keys(path)
    for name, needed in _FIXED.items():
        if keys.get(name, needed) != needed:
            raise ValueError(
                f"{path} has {name}={keys[name]!r}, needed {needed!r}; give the file of an Idefics"
            )
    if abs(keys.get("rescale_factor", SCALE) - SCALE) > 1e-9:
        raise ValueError(f"{path} has rescale_factor={keys['rescale_factor']}, needed 1/255")
    return ImageProcessor(
        image_size=_side(path, keys),
        image_mean=_of_colours(path, keys, "image_mean", MEAN),
        image_std=_of_colours(path, keys, "image_std", STD),
    )


def _of_colours(
    path: Path, keys: dict[str, Any], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    found = keys.get(name, default)
    if not isinstance(found, list | tuple) or len(found) != len(default):
        raise ValueError(f"{path} has {name}={found}, needed a number for red, green and blue")
    red, green, blue = map(float, found)
    return red, green, blue


def _side(path: Path, keys: dict[str, Any]) -> int:
    """Return the height and width of a square; version 4 wrote `image_size`, version 5 `size`."""
    size = keys.get("size") or keys.get("image_size", 224)
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    height, width = sides.get("height"), sides.get("width")
    if not isinstance(height, int) or height != width:
        raise ValueError(f"{path} has size={size}, needed one height and an equal width")
    return height
