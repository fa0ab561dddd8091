"""What stands beside a tokenizer.json: names of special tokens, and the chat template."""

from pathlib import Path
from typing import Any

from trainer.files import read_keys, write_json

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the folder's tokenizer_config.json; empty where there is none."""
    path = folder / CONFIG_FILE
    keys = read_keys(path) if path.is_file() else {}
    for name in SPECIAL_TOKENS:
        if not isinstance(_content(keys.get(name)), str | None):
            raise ValueError(f"{path}: {name}={keys[name]!r} is no text; correct it")
    template = keys.get("chat_template")
    entries = template if isinstance(template, list) else []
    if not isinstance(template, str | list | None) or not all(map(_is_named, entries)):
        raise ValueError(
            f"{path}: chat_template is neither text nor a list of name and template; correct it"
        )
    return {key: value for key, value in keys.items() if key != "auto_map"}  # names code


def _is_named(entry: Any) -> bool:
    """Whether a list's entry is a template with a name."""
    names = ("name", "template")
    return isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in names)


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the text of the special tokens that have a name."""
    return {name: text for name in SPECIAL_TOKENS if (text := _content(config.get(name)))}


def _content(token: Any) -> str | None:
    """Return the text of a token, which tokenizer_config.json may describe by an object."""
    return token.get("content") if isinstance(token, dict) else token


def stored_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return a folder's chat template: as in transformers, a file of its own comes first."""
    path = folder / TEMPLATE_FILE
    return path.read_text("utf-8") if path.is_file() else configured_template(config)


def configured_template(config: dict[str, Any]) -> str | None:
    """Return the template of tokenizer_config.json; of several with names, the default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def write_tokenizer_config(folder: Path, bos: str, eos: str) -> None:
    """Write the tokenizer_config.json of a tokenizer that we made."""
    config = {
        "bos_token": bos,
        "eos_token": eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000_000,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / CONFIG_FILE, config)
