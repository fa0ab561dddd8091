"""RGB images to the numbers that a vision tower reads, as transformers' IdeficsImageProcessor."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.files import read_keys, write_json

FILE = "preprocessor_config.json"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, as in Idefics
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE = 1 / 255
Colours = tuple[float, float, float]
# What the file may say beside sizes, mean and deviation: what is done here anyway.
_FIXED = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "resample": int(Image.Resampling.BICUBIC), "image_num_channels": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resize (bicubic, whatever the shape was), rescale to 0 .. 1, normalise."""

    path: str | None = None
    """Folder with a preprocessor_config.json, which says the rest; None: that of the model's
    folder where it has one, but for the settings below."""
    image_size: int | None = None
    """Height and width that the model reads, in pixels; None: as the model says."""
    image_mean: Colours | None = None
    """Of red, green and blue, 0 to 1; None: as the model's folder says, else CLIP's."""
    image_std: Colours | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} is not positive; set it to 224")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} is not positive; correct it")
        if self.path is not None and self._own:
            raise ValueError(
                f"data.processor.path={self.path} says all settings of images; leave the others out"
            )

    @property
    def _own(self) -> dict[str, Any]:
        names = ("image_size", "image_mean", "image_std")
        own = {name: getattr(self, name) for name in names}
        return {name: value for name, value in own.items() if value is not None}

    @cached_property
    def resolved(self) -> "ImageProcessor":
        """All settings, of a model whose folder says nothing; ValueError for a file that asks for
        what is not done here."""
        if self.path is not None:
            return from_folder(Path(self.path).expanduser())
        return replace(DEFAULT, **self._own)

    def fitted(self, image_size: int, folder: Path | None) -> "ImageProcessor":
        """Return all settings for a model that reads `image_size` pixels.

        `folder`: of the model, whose file gives what is not set. ValueError where they differ.
        """
        if self.path is not None or folder is None or not (folder / FILE).is_file():
            found = self.resolved if self.path else replace(DEFAULT, image_size=image_size)
            source = f"data.processor.path={self.path}" if self.path else "data.processor"
        else:
            found, source = from_folder(folder), str(folder / FILE)
        if self.image_size is not None:
            source = "data.processor"
        found = replace(found, **self._own)
        if found.image_size != image_size:
            raise ValueError(
                f"{source} makes images of {found.image_size} pixels, the model takes "
                f"{image_size}; set data.processor.image_size={image_size}"
            )
        return found

    def save(self, folder: Path) -> None:
        """Write settings that are all set, for transformers 4 and 5."""
        sides = {"height": self.image_size, "width": self.image_size}
        scale = {"size": sides, "rescale_factor": SCALE}
        keys = {"image_processor_type": "IdeficsImageProcessor", **self._own, **scale, **_FIXED}
        write_json(folder / FILE, keys)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return (3, image_size, image_size) float32 of an RGB image."""
        settings = self.resolved
        side = settings.image_size
        assert side is not None
        resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        # In transformers' order of types, so that the bits are the same.
        scaled_HWC = (resized.astype(np.float64) * SCALE).astype(np.float32)
        mean, std = (np.array(x, np.float32) for x in (settings.image_mean, settings.image_std))
        return np.ascontiguousarray(((scaled_HWC - mean) / std).transpose(2, 0, 1))

    def picture(self, pixels_CHW: np.ndarray) -> Image.Image:
        """Return the RGB image whose pixels these are: what a model gets, for people."""
        mean, std = (np.array(x) for x in (self.resolved.image_mean, self.resolved.image_std))
        shown_HWC = (pixels_CHW.transpose(1, 2, 0) * std + mean) / SCALE
        return Image.fromarray(np.rint(shown_HWC).clip(0, 255).astype(np.uint8))


DEFAULT = ImageProcessor(image_size=224, image_mean=MEAN, image_std=STD)


def from_folder(folder: Path) -> ImageProcessor:
    """Read a folder's preprocessor_config.json, of transformers 4 or 5, of an Idefics or a CLIP.

    What CLIP's crops is not cropped: as in Idefics, which took its tower.
    """
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


def _of_colours(path: Path, keys: dict[str, Any], name: str, default: Colours) -> Colours:
    found = keys.get(name, default)
    if not isinstance(found, list | tuple) or len(found) != len(default):
        raise ValueError(f"{path} has {name}={found}, needed a number for red, green and blue")
    red, green, blue = map(float, found)
    return red, green, blue


def _side(path: Path, keys: dict[str, Any]) -> int:
    """Return the height and width of a square; version 4 wrote `image_size`, version 5 `size`."""
    size = keys.get("size") or keys.get("image_size", 224)
    if isinstance(size, dict) and "shortest_edge" in size:
        size = keys.get("crop_size", size)
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    height, width = sides.get("height"), sides.get("width")
    if not isinstance(height, int) or height != width:
        raise ValueError(f"{path} has size={size}, needed one height and an equal width")
    return height
