"""What the assistant wrote in a conversation: characters of the rendered text, and their tokens."""

import numpy as np

from trainer.data.chat_template import Rendered, marks_generation, render
from trainer.data.examples import BadRowError
from trainer.data.shapes import Conversation
from trainer.data.spans import tokens_between
from trainer.data.tokenizers import Tokenizer


def written_turns(
    conversation: Conversation, train_on: str, tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation as text, and the characters [start, stop) of turns to train."""
    turns = _trained(conversation, train_on)
    rendered = _render(conversation, len(conversation.messages), tokenizer)
    return rendered.text, _spans(conversation, turns, rendered, tokenizer)


def _render(
    conversation: Conversation, num_turns: int, tokenizer: Tokenizer, is_prompt: bool = False
) -> Rendered:
    """Write the first turns; as a prompt: with what comes before the assistant's answer."""
    assert tokenizer.chat_template is not None
    return render(
        tokenizer.chat_template,
        conversation.messages[:num_turns],
        tokenizer.special_tokens,
        add_generation_prompt=is_prompt,
        tools=conversation.tools,
    )


def _trained(conversation: Conversation, train_on: str) -> list[int]:
    turns = [n for n, turn in enumerate(conversation.messages) if turn["role"] == "assistant"]
    turns = [n for n in turns if n >= conversation.first_trained]
    if not turns:
        raise BadRowError("the row has no assistant turn, so no token of it would be trained")
    return turns if train_on == "all" else turns[-1:]


def _spans(
    conversation: Conversation, turns: list[int], rendered: Rendered, tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    assert tokenizer.chat_template is not None
    if not marks_generation(tokenizer.chat_template):
        return [_span_by_prefix(conversation, turn, rendered.text, tokenizer) for turn in turns]
    # Marks come in the order of turns, but a turn may have several: the prompt's are counted.
    prompt_roles = [turn["role"] for turn in conversation.messages[: turns[0]]]
    if "assistant" not in prompt_roles:
        return rendered.marked
    return rendered.marked[len(_render(conversation, turns[0], tokenizer).marked) :]


def _span_by_prefix(
    conversation: Conversation, turn: int, text: str, tokenizer: Tokenizer
) -> tuple[int, int]:
    """Return where a turn stands: behind its prompt, up to the end of the turns so far.

    Both must be beginnings of the whole text. A template breaks this where it writes a turn
    otherwise once others follow, or a generation prompt with which no written turn begins.
    """
    if turn == 0:
        raise BadRowError("the row begins with an assistant turn, which answers nothing; drop it")
    prompt = _render(conversation, turn, tokenizer, is_prompt=True).text
    so_far = _render(conversation, turn + 1, tokenizer).text
    if not text.startswith(so_far):
        raise BadRowError(
            f"the chat template writes turn {turn} otherwise once others follow; mark in the "
            "template by {% generation %} what is trained, or set data.encoder.train_on=last"
        )
    if not so_far.startswith(prompt):
        raise BadRowError(
            f"the chat template's generation prompt ends in {prompt[-20:]!r}, which turn {turn} as "
            "written does not begin with; mark the answer in the template by {% generation %}"
        )
    return len(prompt), len(so_far)


def turn_tokens(
    start: int, stop: int, text: str, places: np.ndarray, is_end: np.ndarray
) -> tuple[int, int]:
    """Return the first and the last token of a turn: up to its end-of-turn token (`is_end`).

    White space behind that token is the template's, not the model's. A mark may leave the token
    out: then it is the special token that follows.
    """
    first, last = tokens_between(places, start, stop)
    ends = first + np.flatnonzero(is_end[first : last + 1])
    if len(ends) and not text[places[ends[-1], 1] : stop].strip():
        return first, int(ends[-1])
    follows = last + 1 < len(places) and is_end[last + 1]
    return first, last + int(follows)
