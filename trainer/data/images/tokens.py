"""How an image stands in a text: Idefics' scheme of special tokens.

    <fake_token_around_image><image><fake_token_around_image>

Images side by side share the token between them. In a row of ours <image> is a place for one.
Source: transformers' IdeficsProcessor.
"""

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from trainer.data.examples import BadRowError
from trainer.data.tokenizers import Tokenizer

FAKE, IMAGE = TOKENS = "<fake_token_around_image>", "<image>"  # in the order of Idefics' ids
_RUN = re.compile(f"(?:{FAKE})*(?:{IMAGE}(?:{FAKE})*)+")


class ImageTokens(NamedTuple):
    """The ids of the two tokens."""

    image: int
    fake: int


@lru_cache(maxsize=4)
def image_tokens(tokenizer: Tokenizer) -> ImageTokens:
    """Return the ids; ValueError for a tokenizer that lacks one of them. Every row asks."""
    for token in TOKENS:
        if len(tokenizer.encode(token)) != 1:
            raise ValueError(
                f"the tokenizer has no token {token}, which stands for images; give that of an "
                "Idefics, or set model.additional_vocab_size=2 (of an Idefics), or "
                f"model.additional_tokens=['{FAKE}','{IMAGE}']"
            )
    (fake,), (image,) = map(tokenizer.encode, TOKENS)
    return ImageTokens(image, fake)


def knows_images(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has one of the two tokens."""
    return any(len(tokenizer.encode(token)) == 1 for token in TOKENS)


def with_blocks(
    text: str, spans: list[tuple[int, int]] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return a text with the whole block in place of every <image>, and where its `spans` went.

    Blocks that stand there already stay; spans are characters [start, stop).
    """
    pieces, moved, end = [], {0: 0}, 0
    for run in _RUN.finditer(text):
        block = FAKE + (IMAGE + FAKE) * run[0].count(IMAGE)
        pieces += [text[end : run.start()], block]
        end = run.end()
        moved[end] = sum(map(len, pieces)) - end  # how far what follows is shifted
    borders = sorted(moved)

    def place(character: int) -> int:
        return character + moved[max(border for border in borders if border <= character)]

    return "".join([*pieces, text[end:]]), [(place(a), place(b)) for a, b in spans or ()]


def check_blocks(ids: np.ndarray, tokens: ImageTokens, num_images: int) -> None:
    """Raise BadRowError where a document's tokens are not one whole block for each image."""
    images = np.flatnonzero(ids == tokens.image)
    if len(images) != num_images:
        raise BadRowError(
            f"the text has {len(images)} {IMAGE} tokens and the row {num_images} images; a chat "
            f"template must write {IMAGE} for each part of type image, in their order"
        )
    around = np.union1d(images - 1, images + 1)
    if not np.array_equal(around, np.flatnonzero(ids == tokens.fake)):
        raise BadRowError(
            f"a text holds {FAKE}, which stands around images and nowhere else; take it out"
        )
