"""Encoded bytes to an upright RGB image; whatever is wrong with them is said in one line."""

import io
import warnings
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.data.examples import BadRowError

# Pillow knows 40 more, and runs Ghostscript for one of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
PILLOWS_LIMIT = 89_478_485  # pixels from which Pillow warns; from twice as many on it refuses
BACKGROUND = (255, 255, 255)  # behind what is transparent: white, as in Idefics' own processor
_MAX_16_BITS = 65535


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the first frame of an encoded image, upright, RGB, 8 bits per channel.

    Transparent pixels are laid on white; 16 bits are scaled to 8. BadRowError for what is no image,
    has more than `max_pixels` pixels (its header says so before any is decoded), or is broken.
    """
    try:
        image = _opened(data, max_pixels)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a large image is much memory
        return _rgb(image)
    except (BadRowError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise BadRowError(f"is broken: {reason}; replace it, or drop the row") from None


@cache
def silence_pillow() -> None:
    """Leave it to us to say which size is too large; once, since filters are of all threads."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header alone."""
    advice = "make it smaller, raise data.max_pixels, or drop the row"
    silence_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadRowError(f"is no image; needed one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadRowError(
            f"has more than {2 * PILLOWS_LIMIT} pixels, data.max_pixels={max_pixels} allows fewer; "
            f"{advice}"
        ) from None
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise BadRowError(
            f"has {width} x {height} pixels, needed 1 to data.max_pixels={max_pixels}; {advice}"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadRowError("holds floating-point numbers, of which white is unknown; convert it")
    if image.mode.startswith("I"):
        image = _eight_bits(np.asarray(image))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        overlay = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
        image = Image.alpha_composite(background, overlay)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> Image.Image:
    """Return 16-bit grey values as 8-bit ones; Pillow's own conversion cuts at 255."""
    if values.min() < 0 or values.max() > _MAX_16_BITS:
        raise BadRowError(
            f"has values from {values.min()} to {values.max()}, needed 8 or 16 bits; convert it"
        )
    # 65535 becomes 255. Whole numbers: fractions of a large image would take a gigabyte.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
