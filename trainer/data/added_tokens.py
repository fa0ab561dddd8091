"""A tokenizer with more tokens, whose ids are the rows behind a model's vocabulary."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.data.tokenizer_config import CONFIG_FILE, read_tokenizer_config
from trainer.data.tokenizers import FileTokenizer, Tokenizer
from trainer.files import write_json


def check_tokens(tokens: tuple[str, ...]) -> None:
    """Raise ValueError for tokens that no text can hold, or that are one and the same."""
    for number, token in enumerate(tokens):
        if not token or token != token.strip() or token in tokens[:number]:
            what = "twice the same" if token in tokens[:number] else "empty or begins or ends blank"
            raise ValueError(
                f"model.additional_tokens: {token!r} is {what}; take it out or write it another way"
            )


def extended(tokenizer: Tokenizer, tokens: tuple[str, ...], first: int) -> Tokenizer:
    """Return a tokenizer that knows `tokens` as the ids from `first` on, as transformers would.

    New ids follow the last one. Where that lies below `first` (embeddings may have more rows than
    there are tokens), placeholders fill the gap. A tokenizer that has them so already is returned
    as it is. ValueError for a token that exists under another id.
    """
    if not tokens:
        return tokenizer
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    wanted = list(range(first, first + len(tokens)))
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        path = str(folder / "tokenizer.json")
        fast = Fast.from_file(path)
        if [fast.token_to_id(token) for token in tokens] == wanted:
            return tokenizer
        _refuse_known(fast, tokens)
        last = max(fast.get_vocab(with_added_tokens=True).values())
        fillers = [f"<|unused_{number}|>" for number in range(last + 1, first)]
        # As written in the text: a normalizer may put a space in front, or make letters small.
        fast.add_tokens([AddedToken(text, normalized=False) for text in (*fillers, *tokens)])
        found = [fast.token_to_id(token) for token in tokens]
        if found != wanted:
            raise ValueError(
                f"model.additional_tokens would get the ids {found}, and the model's rows for them "
                f"are {wanted}; give a tokenizer whose ids are those of the model"
            )
        fast.save(path)
        _list_in_config(folder, fast, last)
        return FileTokenizer(folder)


def _refuse_known(fast: Any, tokens: tuple[str, ...]) -> None:
    for token in tokens:
        if (number := fast.token_to_id(token)) is not None:
            raise ValueError(
                f"model.additional_tokens: the tokenizer has {token!r} already, as {number}; "
                "take it out"
            )


def _list_in_config(folder: Path, fast: Any, last: int) -> None:
    """Add what is new to a tokenizer_config.json that lists all added tokens."""
    config = read_tokenizer_config(folder)
    listed = config.get("added_tokens_decoder")
    if not listed:
        return
    for number, token in fast.get_added_tokens_decoder().items():
        if number > last:
            flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            listed[str(number)] = {flag: getattr(token, flag) for flag in flags}
    write_json(folder / CONFIG_FILE, config)
