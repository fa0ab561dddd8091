"""Small pictures, rows that name them, and a tokenizer that knows where images stand."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.data.added_tokens import extended
from trainer.data.images.processor import ImageProcessor
from trainer.data.images.tokens import TOKENS
from trainer.data.tokenizer_config import CONFIG_FILE
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer
from trainer.data.vision_text import VisionTextEncoder
from trainer.data.vision_text_data import VisionTextData


def tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Return the byte tokenizer with the tokens of images: 258 and 259."""
    return extended(ByteTokenizer(chat_template=chat_template), TOKENS, ByteTokenizer.vocab_size)


def endless_tokenizer(folder: Path) -> Tokenizer:
    """Return one without EOS: nothing but their segments tells documents of a row apart."""
    tokenizer().save(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["eos_token"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return FileTokenizer(folder)


def picture(number: int, size: tuple[int, int] = (10, 8), mode: str = "RGB") -> Image.Image:
    """Return a picture of noise, another one for every number."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write pictures into `folder`/images; return their paths below `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(number)))
    return names


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixed_rows(names: list[str], count: int) -> list[dict[str, Any]]:
    """Return rows of 0 to 4 images each, in several shapes; every third has none."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        own = [names[(number * 3 + k) % len(names)] for k in range(4)]
        words = "so " * (number % 5)
        rows.append(
            [
                {"question": f"what is {number}?", "answer": words + str(number)},
                {"image": own[0], "question": f"who is {number}?", "answer": words + "me"},
                {"texts": [f"{number}:", None, words + "and", None], "images": _holes(own[:2])},
                {"prompt": f"plain {number}", "completion": words + "text"},
                {"images": own[:3], "prompt": f"<image>, <image> {number} <image>",
                 "completion": "three"},
                {"images": own, "text": f"caption {number}"},
            ][number % 6]
        )  # fmt: skip
    return rows


def mixed_data(
    folder: Path, image_size: int, *, num_pictures: int = 11, num_rows: int = 60, **changes: Any
) -> VisionTextData:
    """Write pictures and `mixed_rows` into `folder`; return them as data."""
    names = write_pictures(folder, num_pictures)
    settings: dict[str, Any] = {"row_images": 5, "global_documents": 12, "micro_rows": 2}
    return VisionTextData(
        path=write_rows(folder / "rows.jsonl", mixed_rows(names, num_rows)), row_tokens=64,
        encoder=VisionTextEncoder(), processor=ImageProcessor(image_size=image_size),
        cache=str(folder / "cache"), **settings | changes,
    )  # fmt: skip


def _holes(names: list[str]) -> list[str | None]:
    return [None, names[0], None, names[1]]
