"""Chat and instruction rows to documents: which tokens the model learns to write."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from models.nn.head import IGNORED
from trainer.data.examples import BadRowError, Example, Note
from trainer.data.shapes import (
    COLUMNS,
    Conversation,
    Pair,
    check_columns,
    check_names,
    explain,
    find_shape,
    read,
)
from trainer.data.tokenizers import Tokenizer, surround
from trainer.data.turns import turn_tokens, written_turns


@dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Documents of conversations, prompts with completions, and plain texts (shapes.py).

    Of a conversation the assistant's turns are trained, each with its end-of-turn token; of a pair
    the completion and EOS; of a text everything.
    """

    columns: dict[str, str] = field(default_factory=dict)
    """The data's column of each of ours, as {prompt: question_text, completion: answer_text};
    empty: the names in shapes.py."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns of a conversation are trained."""
    system: str | None = None
    """System message of conversations that have none; None: as the template writes them."""

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
        if find_shape(row, self.columns) is None:
            raise ValueError(f"{where}: {explain(row, self.columns)}")
        content = _read_first(row, self.columns, where)
        has_effect = isinstance(content, Conversation)
        if not has_effect and (self.system is not None or self.train_on != "all"):
            raise ValueError(
                f"{where} holds no conversations, so data.encoder.system and "
                "data.encoder.train_on have no effect; leave them out"
            )

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the document; ValueError for a tokenizer without the template that it needs."""
        content = read(row, self.columns)
        if isinstance(content, Conversation):
            if tokenizer.chat_template is not None:
                prepared = with_system(content, self.system)
                return turns_example(*written_turns(prepared, self.train_on, tokenizer), tokenizer)
            content = as_plain(content)
        if isinstance(content, Pair):
            return pair_example(content, tokenizer)
        return text_example(content, tokenizer)


def as_plain(conversation: Conversation) -> Pair:
    """Return what a conversation is without a template; ValueError where it needs one."""
    if conversation.plain is None:
        raise ValueError(
            "the tokenizer has no chat template, which conversations need; put a "
            "chat_template.jinja beside its tokenizer.json"
        )
    return conversation.plain


def turns_example(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Example:
    """Return the document of a written conversation, whose turns at `spans` are trained."""
    ids, places = tokenizer.encode_with_spans(text)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise BadRowError("the chat template writes BOS twice; take one out of the template")
    is_special = np.isin(ids, list(tokenizer.special_ids))
    is_end = is_special & ((ids != tokenizer.bos_token_id) | (ids == tokenizer.eos_token_id))
    is_trained, notes = np.zeros(len(ids), bool), []
    for start, stop in spans:
        first, last = turn_tokens(start, stop, text, places, is_end)
        is_trained[first : last + 1] = True
        if first <= last and places[first, 0] < start:
            notes.append(
                Note("replies that share a token with their header", text[start : start + 5])
            )
    num_bytes = _num_bytes(text, places[is_trained & ~is_special])
    return _example(ids, is_trained, num_bytes, tuple(notes))


def _read_first(row: dict[str, Any], columns: dict[str, str], where: str) -> Any:
    try:
        return read(row, columns)
    except BadRowError as error:
        raise ValueError(f"the first row of {where}: {error}") from None


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """Return a conversation with this system message, unless it has one; None: as it is."""
    if system is None or conversation.messages[0]["role"] == "system":
        return conversation
    return replace(
        conversation,
        messages=[{"role": "system", "content": system}, *conversation.messages],
        first_trained=conversation.first_trained + 1,
    )


def _num_bytes(text: str, places: np.ndarray) -> int:
    """Count the UTF-8 bytes of the characters of some tokens, several of which may share one."""
    is_covered = np.zeros(len(text), bool)
    for start, stop in places:
        is_covered[start:stop] = True
    return len("".join(text[n] for n in np.flatnonzero(is_covered)).encode())


def pair_example(pair: Pair, tokenizer: Tokenizer) -> Example:
    """Tokenise prompt and completion as one text; a token with a character of both is trained.

    So the model reads what it will read when it is asked, and no part of the answer is lost.
    """
    if not pair.completion:
        raise BadRowError("the completion is empty, so there is nothing to learn; drop the row")
    ids, places = tokenizer.encode_with_spans(pair.prompt + pair.completion)
    whole = _document(ids, tokenizer)
    is_trained = np.ones(len(whole), bool)
    num_before = int(tokenizer.bos_token_id is not None)
    is_trained[:num_before] = False
    is_trained[num_before : num_before + len(ids)] = places[:, 1] > len(pair.prompt)
    prompt_ids = tokenizer.encode(pair.prompt)
    notes = (
        ()
        if ids[: len(prompt_ids)].tolist() == prompt_ids
        else (
            Note(
                "prompts that are tokenised otherwise when a completion follows", pair.prompt[-20:]
            ),
        )
    )
    return _example(whole, is_trained, len(pair.completion.encode()), notes)


def text_example(text: str, tokenizer: Tokenizer) -> Example:
    """Return the document of a text, all of which is trained."""
    whole = _document(tokenizer.encode_with_spans(text)[0], tokenizer)
    return _example(whole, np.ones(len(whole), bool), len(text.encode()))


def _document(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return ids with one BOS and one EOS; a text may have brought its EOS along."""
    if len(ids) and ids[0] == tokenizer.bos_token_id:
        raise BadRowError("the text begins with BOS, which every document gets; take it out")
    has_end = len(ids) > 0 and ids[-1] == tokenizer.eos_token_id
    return surround(ids[:-1] if has_end else ids, tokenizer)


def _example(
    ids: np.ndarray, is_trained: np.ndarray, num_bytes: int, notes: tuple[Note, ...] = ()
) -> Example:
    """Return the document with the target of each position: the next token, if it is trained."""
    labels = np.full(len(ids), IGNORED, np.int64)
    labels[:-1] = np.where(is_trained[1:], ids[1:], IGNORED)
    if not (labels != IGNORED).any():
        raise BadRowError("no token of the row is trained; drop the row")
    return Example(input_ids=ids, labels=labels, num_bytes=num_bytes, notes=notes)
