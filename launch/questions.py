"""What `tessera generate` is asked: a text to continue, or a message to answer, about images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.binding import convert

KINDS = ("prompt", "prompt_file", "chat")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text with its ids, as the model is given them."""

    text: str
    ids: list[int]
    shown: str
    """What stands before the answer where it is printed: of a conversation nothing."""
    stops: tuple[int, ...] = ()
    """Ids that end the answer, beside those of the model."""


def check_kind(options: dict[str, Any]) -> None:
    """Raise ValueError unless exactly one kind of question is among the options."""
    given = [kind for kind in KINDS if kind in options]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"one of {', '.join(KINDS)} is needed, found {found}; set prompt=TEXT")
    if "chat" in given and "bos" in options:
        raise ValueError("bos has no effect on chat, whose template writes BOS; leave it out")


def read_paths(options: dict[str, Any]) -> list[Path]:
    """Take the paths of `image=FILE` or `image=[FILE,FILE]` out of the options."""
    value = options.pop("image", None)
    if value is None:
        return []
    names: Any = [value]
    if value.startswith("[") and value.endswith("]"):
        import yaml

        try:
            names = yaml.safe_load(value)
        except yaml.YAMLError:
            names = []
    if not names or "" in names:
        raise ValueError(f"image={value} names no file; set image=FILE or image=[FILE,FILE]")
    return [Path(str(name)).expanduser() for name in names]


def read_question(options: dict[str, Any], tokenizer: Any, num_images: int | None) -> Question:
    """Take the question out of the options; ValueError where it cannot be read or written.

    `num_images`: how many images it is about; None: the model looks at none.
    """
    if "chat" in options:
        return _conversation(str(options.pop("chat")), tokenizer, num_images)
    has_bos = convert(options.pop("bos", True), bool, "bos")
    text = _text(options)
    bos = [tokenizer.bos_token_id] if has_bos and tokenizer.bos_token_id is not None else []
    ids = tokenizer.encode(_with_blocks(_placed(text, num_images), num_images))
    return Question(text=text, ids=[*bos, *ids], shown=text)


def _placed(text: str, num_images: int | None) -> str:
    """Return a text with a place for each image; without images to look at, as it is."""
    if num_images is None:
        return text
    from trainer.prompt_images import placed

    return placed(text, num_images)


def _with_blocks(text: str, num_images: int | None) -> str:
    """Return a text with the tokens of images at their places, as in training."""
    from trainer.data.images.tokens import with_blocks

    return with_blocks(text)[0] if num_images else text


def _text(options: dict[str, Any]) -> str:
    if "prompt" in options:
        return str(options.pop("prompt"))
    path = Path(options.pop("prompt_file")).expanduser()
    if not path.is_file():
        raise ValueError(f"prompt_file={path} is no file; give one, or prompt=TEXT")
    return path.read_text(encoding="utf-8")


def _conversation(message: str, tokenizer: Any, num_images: int | None) -> Question:
    """Return the user's message as the chat template writes it, up to where the answer begins."""
    from trainer.data.chat_template import render
    from trainer.data.examples import BadRowError
    from trainer.data.shapes import Conversation
    from trainer.data.vision_text import with_parts
    from trainer.export.stops import end_of_turn

    if tokenizer.chat_template is None:
        raise ValueError("chat needs a chat template, and the tokenizer has none; set prompt=TEXT")
    turn = {"role": "user", "content": _placed(message, num_images)}
    conversation = Conversation(messages=[turn])
    if num_images:
        conversation = with_parts(conversation, tokenizer.chat_template)
    try:
        text = render(
            tokenizer.chat_template, conversation.messages, tokenizer.special_tokens,
            add_generation_prompt=True,
        ).text  # fmt: skip
    except BadRowError as error:
        raise ValueError(f"chat={message!r}: {error}; set prompt=TEXT") from None
    end = end_of_turn(tokenizer)
    return Question(
        text=text, ids=tokenizer.encode(_with_blocks(text, num_images)), shown="",
        stops=() if end is None else (end,),
    )  # fmt: skip
