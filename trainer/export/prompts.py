"""The texts on which an exported model must answer as ours does, and their ids."""

from dataclasses import dataclass

from trainer.data.chat_template import render
from trainer.data.examples import BadRowError
from trainer.data.tokenizers import FileTokenizer, with_ends

# One token, a sentence, code, letters of many alphabets with an emoji and a combining accent, and a
# text that is longer than most sliding windows of small models and than one attention block.
DEFAULT = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "def square(x):\n\treturn x ** 2  # 1,234.5\n",
    "Stra\u00dfe, \u65e5\u672c\u8a9e, \u05e9\u05dc\u05d5\u05dd, \u0928\u092e\u0938\u094d"
    "\u0924\u0947, cafe\u0301 \U0001f600",
    "It was the best of times, it was the worst of times. " * 20,
)
CONVERSATION = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text, and what our tokenizer makes of it."""

    text: str
    bare_ids: list[int]
    """Without the special tokens that transformers adds to a text."""
    ids: list[int]
    """What the model is asked: with them."""


def prompts_of(
    tokenizer: FileTokenizer, given: tuple[str, ...], max_tokens: int, vocab_size: int
) -> list[Prompt]:
    """Return the `given` texts or the default ones, and a conversation where there is a template.

    Logits are asked of `max_tokens` at most. ValueError for a text without tokens, or a token that
    the model has no row for.
    """
    prompts = [_prompt(text, tokenizer, max_tokens) for text in given or DEFAULT]
    if (text := conversation(tokenizer)) is not None:
        ids = tokenizer.encode(text)
        prompts.append(Prompt(text=text, bare_ids=ids, ids=ids[:max_tokens]))
    for prompt in prompts:
        if not prompt.ids:
            raise ValueError(f"prompts: {prompt.text!r} has no token; give a longer text")
        if max(prompt.bare_ids, default=0) >= vocab_size:
            raise ValueError(
                f"the tokenizer gives {max(prompt.bare_ids)}, and the model has vocab_size="
                f"{vocab_size}; put the tokenizer.json of this model into its folder"
            )
    return prompts


def _prompt(text: str, tokenizer: FileTokenizer, max_tokens: int) -> Prompt:
    bare = tokenizer.encode(text)
    return Prompt(text=text, bare_ids=bare, ids=with_ends(bare, tokenizer).tolist()[:max_tokens])


def conversation(tokenizer: FileTokenizer) -> str | None:
    """Return a conversation that awaits its answer; None where the template cannot write it."""
    if tokenizer.chat_template is None:
        return None
    try:
        return render(
            tokenizer.chat_template, list(CONVERSATION), tokenizer.special_tokens,
            add_generation_prompt=True,
        ).text  # fmt: skip
    except BadRowError:
        return None  # it wants other roles or more than texts
