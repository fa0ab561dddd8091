"""Text to token ids: bytes, a Hugging Face tokenizer.json, or a BPE trained on the corpus."""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from trainer.files import write_json, write_text

BYTE, BPE = "byte", "bpe"  # values of `tokenizer=` that name no folder
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


class Tokenizer(Protocol):
    """What the data pipeline, generation and export need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids."""
        ...

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Return each text as ids, with one BOS before and one EOS behind where they exist."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        ...


class ByteTokenizer:
    """256 bytes, then BOS and EOS: needs no file, reads any text, and 1 token is 1 byte."""

    vocab_size = 258
    bos_token_id, eos_token_id = 256, 257

    @cached_property
    def fingerprint(self) -> str:
        """Equal to that of the saved folder, which gives the same ids."""
        return _fingerprint(self._json(), self.bos_token_id, self.eos_token_id)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        return [self._document(text) for text in texts]

    def _document(self, text: str) -> np.ndarray:
        data = np.frombuffer(text.encode(), np.uint8)
        return np.concatenate(([self.bos_token_id], data, [self.eos_token_id]))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write the same mapping as a byte-level BPE without merges, for Hugging Face readers."""
        write_text(folder / "tokenizer.json", self._json())
        _write_config(folder, BOS, EOS)

    def _json(self) -> str:
        letters = _byte_letters()
        vocab = {letters[byte]: byte for byte in range(256)}
        model: dict[str, object] = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": [],
        }  # fmt: skip
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        added = [
            {
                "id": number, "content": token, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
            for number, token in ((self.bos_token_id, BOS), (self.eos_token_id, EOS))
        ]  # fmt: skip
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
            "decoder": byte_level, "model": model,
        }  # fmt: skip
        return json.dumps(tokenizer, indent=1) + "\n"


def _fingerprint(tokenizer_json: str, bos_token_id: int | None, eos_token_id: int | None) -> str:
    specials = f"{bos_token_id}/{eos_token_id}"
    return xxhash.xxh3_128_hexdigest((tokenizer_json + specials).encode())


def _byte_letters() -> list[str]:
    """Return byte-level BPE's printable stand-in of each byte. Source: Radford 2019 (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class FileTokenizer:
    """A Hugging Face fast tokenizer: a folder with tokenizer.json, BOS/EOS by name beside it."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Fast

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"tokenizer={folder} has no tokenizer.json; "
                "give a folder that has one, or tokenizer=byte or tokenizer=bpe"
            )
        self._json = path.read_text(encoding="utf-8")
        try:
            self._fast = Fast.from_str(self._json)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{path} is no tokenizer: {error}; give another folder") from None
        config_path = folder / "tokenizer_config.json"
        self._config = json.loads(config_path.read_text()) if config_path.is_file() else {}
        self.bos_token_id, self.eos_token_id = self._special("bos"), self._special("eos")
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _fingerprint(self._json, self.bos_token_id, self.eos_token_id)

    def _special(self, kind: str) -> int | None:
        token: Any = self._config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        number = self._fast.token_to_id(token)
        if number is None:
            raise ValueError(
                f"tokenizer_config.json names {token!r} as {kind}_token, but tokenizer.json has no "
                "such token; correct one of the two files"
            )
        return number

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        before = [] if self.bos_token_id is None else [self.bos_token_id]
        behind = [] if self.eos_token_id is None else [self.eos_token_id]
        encoded = self._fast.encode_batch(texts, add_special_tokens=False)
        return [np.array([*before, *encoding.ids, *behind], np.int64) for encoding in encoded]

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        write_text(folder / "tokenizer.json", self._json)
        write_json(folder / "tokenizer_config.json", self._config)


def given_tokenizer(setting: str) -> ByteTokenizer | FileTokenizer:
    """Return the tokenizer of a `tokenizer=` setting that needs no training: byte or a folder."""
    return ByteTokenizer() if setting == BYTE else FileTokenizer(Path(setting).expanduser())


def train_bpe(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE with BOS and EOS on `texts`, and save it to `folder`."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_nonempty(texts), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, BOS, EOS)
    write_text(folder / "tokenizer.json", fast.to_str(pretty=False))


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text)


def _write_config(folder: Path, bos: str, eos: str) -> None:
    config = {
        "bos_token": bos,
        "eos_token": eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000_000,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
