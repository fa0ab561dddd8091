"""Pairs of texts to documents: what of two answers to a prompt is preferred."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from models.nn.head import IGNORED
from trainer.data.chat import ChatEncoder
from trainer.data.examples import PREFERENCE, BadRowError, Example, Labels, Note
from trainer.data.labels import column_of
from trainer.data.tokenizers import Tokenizer

_CHAT = ChatEncoder()


@dataclass(frozen=True, kw_only=True)
class PreferenceEncoder:
    """One document of both texts, the chosen one first, each as data=chat would write it.

    Both are texts, or lists of messages; so is the prompt, or both begin with it.
    """

    prompt: str = "prompt"
    """Column of the prompt: text or messages. Without it the prompt is what both texts share: their
    first messages, or tokens."""
    chosen: str = "chosen"
    """Column of the preferred answer, or of a whole conversation with it."""
    rejected: str = "rejected"
    """Column of the other one."""
    learns: Literal["reward", "text"] = "text"
    """`text`: of all tokens, EOS too. `reward`: transformers reads a reward at the last token that
    is no padding, and EOS may stand in for padding; so texts end there."""
    max_tokens: int | None = None
    """How many tokens of each text are kept, prompt included; None: all."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no answer; set it to 512")

    @property
    def outputs(self) -> Labels:
        names = ("reward",) if self.learns == "reward" else ()
        return Labels(names=names, problem_type=PREFERENCE)

    def with_labels(self, find: Callable[[str], tuple[str, ...]]) -> Self:
        return self

    def check(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError where a column is missing or a first row is no pair."""
        for name in ("chosen", "rejected"):
            column_of(row, getattr(self, name), name, where)
        if self.prompt != "prompt":
            column_of(row, self.prompt, "prompt", where)
        try:
            self._chats(row)
        except BadRowError as error:
            raise ValueError(f"the first row of {where}: {error}") from None

    def encode(self, row: dict[str, Any], tokenizer: Tokenizer) -> Example:
        """Return the pair; ValueError for a tokenizer without the template that it needs."""
        whole = [_CHAT.encode(chat, tokenizer) for chat in self._chats(row)]
        texts = [self._ended(one.input_ids, tokenizer) for one in whole]
        chosen, rejected = (text[: self.max_tokens] for text in texts)
        shared = _num_shared(chosen, rejected)
        prompt = min(map(_first_trained, whole))
        if row.get(self.prompt):
            if shared < prompt:
                raise BadRowError("the two texts do not begin with the same prompt; correct it")
        else:
            prompt = min(shared, len(chosen) - 1, len(rejected) - 1)
        if min(len(chosen), len(rejected)) <= prompt:
            raise BadRowError(
                f"the prompt has {prompt} tokens and nothing is left behind it of an answer "
                f"(data.encoder.max_tokens={self.max_tokens}); raise that, or drop the row"
            )
        if shared == len(chosen) == len(rejected):
            raise BadRowError(
                f"{self.chosen} and {self.rejected} are the same, so none is preferred; drop it"
            )
        is_cut = len(chosen) + len(rejected) < sum(map(len, texts))
        notes = (Note("pairs cut to data.encoder.max_tokens", str(self.max_tokens)),) * is_cut
        return Example(
            input_ids=np.concatenate((chosen, rejected)),
            classes=np.array([prompt, len(chosen)], np.int64),
            notes=notes,
        )

    def _ended(self, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        if self.learns == "text":
            return ids
        return ids[: np.flatnonzero(ids != tokenizer.pad_token_id)[-1] + 1]

    def _chats(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the two texts as rows of data=chat: a prompt, and what follows it."""
        found: list[Any] = [row.get(name) for name in (self.prompt, self.chosen, self.rejected)]
        prompt, chosen, rejected = found
        for name, answer in ((self.chosen, chosen), (self.rejected, rejected)):
            if not answer or not isinstance(answer, str | list):
                kind = "nothing" if not answer else type(answer).__name__
                raise BadRowError(f"column {name} holds {kind}, needed text or messages")
        count = 0  # messages of both that are the prompt's
        if isinstance(chosen, list) and isinstance(rejected, list):
            count = _num_shared(chosen, rejected)
            if isinstance(prompt, list):
                is_repeated = count >= len(prompt) and chosen[: len(prompt)] == prompt
                count = len(prompt) if is_repeated else 0
            elif isinstance(prompt, str) and not count:
                prompt = [{"role": "user", "content": prompt}]
            else:
                prompt = chosen[:count]
            if not prompt or count in (len(chosen), len(rejected)):
                raise BadRowError(
                    f"{self.chosen} and {self.rejected} are no two answers to one prompt: both "
                    f"begin with the same messages, or column {self.prompt} holds them"
                )
        return [{"prompt": prompt or "", "completion": one[count:]} for one in (chosen, rejected)]


def _num_shared(one: Any, other: Any) -> int:
    """Return how many items two sequences share at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _first_trained(example: Example) -> int:
    """Return the first token that the model learns to write; BadRowError where others follow."""
    assert example.labels is not None
    trained = np.flatnonzero(example.labels != IGNORED)
    if len(trained) <= trained[-1] - trained[0]:
        raise BadRowError(
            "turns of others follow the first answer; put all but the last answer into the prompt"
        )
    return int(trained[0]) + 1
