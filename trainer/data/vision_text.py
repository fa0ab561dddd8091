"""Rows with images to documents: where images stand, and which tokens the model learns to write."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from models.nn.head import IGNORED
from trainer.data.chat import (
    ChatEncoder,
    as_plain,
    pair_example,
    text_example,
    turns_example,
    with_system,
)
from trainer.data.examples import BadRowError, Example
from trainer.data.images.mask import latest_image
from trainer.data.images.references import ImageReference
from trainer.data.images.tokens import (
    FAKE,
    IMAGE,
    ImageTokens,
    check_blocks,
    image_tokens,
    with_blocks,
)
from trainer.data.shapes import Conversation, Pair, check_columns, check_names, read
from trainer.data.tokenizers import Tokenizer
from trainer.data.turns import written_turns
from trainer.data.vision_rows import COLUMNS, Flat, flattened


@dataclass(frozen=True, kw_only=True)
class VisionTextEncoder:
    """Documents of questions about images, captions, conversations and interleaved texts
    (vision_rows.py), with or without images.

    Trained are the same tokens as by ChatEncoder, but never those of images.
    """

    columns: dict[str, str] = field(default_factory=dict)
    """The data's column of each of ours, as {image: picture, question: asked, answer: reply};
    empty: the names in vision_rows.py."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns of a conversation are trained."""
    system: str | None = None
    """System message of conversations that have none; None: as the template writes them."""
    separator: str = " "
    """Stands between a prompt and its completion where neither has white space there; trained."""

    def __post_init__(self) -> None:
        check_names(self.columns, COLUMNS)

    @property
    def outputs(self) -> None:
        return None

    def with_labels(self, find: Callable[[str], tuple[str, ...]]) -> Self:
        return self

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError for a first row of no known shape, or a setting without effect."""
        check_columns(self.columns, row, where)
        try:
            flat = flattened(row, self.columns)
        except BadRowError as error:
            raise ValueError(f"the first row of {where}: {error}") from None
        ChatEncoder(train_on=self.train_on, system=self.system).check(flat.row, where)

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document and where its images are stored; none of them is opened.

        ValueError for a tokenizer without the tokens of images, or the template that it needs.
        """
        tokens = image_tokens(tokenizer)
        flat = flattened(row, self.columns)
        example = self._of_text(flat, tokens, tokenizer)
        check_blocks(example.input_ids, tokens, len(flat.images))
        return _without_targets_of_images(example, flat.images, tokens, tokenizer)

    def _of_text(self, flat: Flat, tokens: ImageTokens, tokenizer: Tokenizer) -> Example:
        content = read(flat.row, {})
        if isinstance(content, Conversation):
            if tokenizer.chat_template is not None:
                prepared = with_parts(with_system(content, self.system), tokenizer.chat_template)
                text, spans = written_turns(prepared, self.train_on, tokenizer)
                example = turns_example(*with_blocks(text, spans), tokenizer)
                return replace(example, num_bytes=example.num_bytes - _image_bytes(example, tokens))
            content = as_plain(content)
        if isinstance(content, Pair):
            pair = self._separated(content)
            example = pair_example(
                Pair(prompt=_blocks(pair.prompt), completion=_blocks(pair.completion)), tokenizer
            )
            return replace(example, num_bytes=_num_bytes(pair.completion))
        return replace(text_example(_blocks(content), tokenizer), num_bytes=_num_bytes(content))

    def _separated(self, pair: Pair) -> Pair:
        is_apart = (
            not pair.prompt
            or not pair.completion  # which is refused with its own reason
            or pair.prompt[-1].isspace()
            or pair.completion[0].isspace()
        )
        return pair if is_apart else replace(pair, completion=self.separator + pair.completion)


def _blocks(text: str) -> str:
    return with_blocks(text)[0]


def _num_bytes(text: str) -> int:
    """Count the UTF-8 bytes of a text but for its images."""
    return len(text.replace(FAKE, "").replace(IMAGE, "").encode())


def _image_bytes(example: Example, tokens: ImageTokens) -> int:
    """Count the bytes of image tokens that stand in trained turns."""
    assert example.labels is not None
    counts = [int((example.labels == token).sum()) for token in (tokens.image, tokens.fake)]
    return counts[0] * len(IMAGE) + counts[1] * len(FAKE)


def with_parts(conversation: Conversation, template: str) -> Conversation:
    """Give a template that asks for images the contents as parts, any other one as text."""
    if "image" not in template:
        return conversation
    return replace(
        conversation,
        messages=[
            turn | {"content": list(_parts(turn["content"]))} if "content" in turn else turn
            for turn in conversation.messages
        ],
    )


def _parts(text: str) -> list[dict[str, str]]:
    first, *others = text.split(IMAGE)
    parts = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def _without_targets_of_images(
    example: Example, images: tuple[ImageReference, ...], tokens: ImageTokens, tokenizer: Tokenizer
) -> Example:
    """Return the example with its images, none of whose tokens is a target."""
    assert example.labels is not None
    labels = np.where(np.isin(example.labels, tokens), IGNORED, example.labels)
    is_target = labels != IGNORED
    if not is_target.any():
        raise BadRowError("no token of the row but those of images is trained; drop the row")
    ids = example.input_ids
    sees = latest_image(ids, np.ones_like(ids), tokens.image, tokenizer.eos_token_id)
    is_behind = np.cumsum(ids == tokens.image) > 0
    if (is_target & is_behind & (sees < 0)).any():
        raise BadRowError(
            "tokens are trained behind an EOS, from where Idefics sees no image any more; take a "
            "chat template that ends turns with another token, or rows of one question each"
        )
    return replace(example, labels=labels, images=images)
