"""Which tokens end what an exported model writes: generation_config.json."""

from pathlib import Path
from typing import Any

from trainer.data.chat import ChatEncoder
from trainer.data.examples import BadRowError
from trainer.data.tokenizers import FileTokenizer
from trainer.files import read_keys

FILE = "generation_config.json"
_STALE = ("transformers_version", "_from_model_config")


def generation_config(
    tokenizer: FileTokenizer, config: dict[str, Any], origins: list[Path]
) -> dict[str, Any]:
    """Return the file's keys: those of the first of `origins` that has one, ends and padding.

    It stops at the tokenizer's EOS, at the end of an assistant's turn as the chat template writes
    it, and at whatever the original stops at.
    """
    path = next((folder / FILE for folder in origins if (folder / FILE).is_file()), None)
    given = {} if path is None else read_keys(path)
    known = given.get("eos_token_id", config.get("eos_token_id"))
    ends = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    ends += known if isinstance(known, list) else [known]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    keys = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": tokenizer.pad_token_id,
    }
    kept = {key: value for key, value in given.items() if key not in _STALE}
    return kept | {key: value for key, value in keys.items() if value is not None}


def end_of_turn(tokenizer: FileTokenizer) -> int | None:
    """Return the special token that ends an assistant's turn; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        labels = ChatEncoder().encode({"messages": turns}, tokenizer).labels
    except BadRowError:
        return None
    assert labels is not None
    last = int(labels[labels >= 0][-1])  # of what training on this turn would teach
    return last if last in tokenizer.special_ids else None
