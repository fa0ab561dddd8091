"""Text to token ids: bytes, a Hugging Face tokenizer.json, or a BPE trained on the corpus."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from trainer.data.byte_level import byte_level_json
from trainer.data.panics import no_panic
from trainer.data.tokenizer_config import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    configured_template,
    read_tokenizer_config,
    special_tokens,
    stored_template,
    write_tokenizer_config,
)
from trainer.errors import DataError
from trainer.files import write_json, write_text

BYTE, BPE = "byte", "bpe"  # values of `tokenizer=` that name no folder
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


class Tokenizer(Protocol):
    """What the data pipeline, generation and export need of a tokenizer."""

    def __hash__(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None:
        """The padding token, or what stands in for it: EOS, else BOS."""
        ...

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """Ids that `tokenizer(text)` of transformers puts before and behind a text."""
        ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens that have a name: bos_token, eos_token, ..."""
        ...

    @property
    def special_ids(self) -> dict[int, str]:
        """Ids that stand for no text, and how they are written."""
        ...

    @property
    def chat_template(self) -> str | None:
        """How a conversation is written, in Jinja; None: the tokenizer knows no conversations."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text and conversations become ids."""
        ...

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Return each text as ids, with one BOS before and one EOS behind where they exist."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone, without special tokens."""
        ...

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (n,) and the characters [start, stop) of each, (n, 2); none are added.

        Special tokens that are written in the text become their ids.
        """
        ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        ...


def surround(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return a document: `ids` with one BOS before and one EOS behind where they exist."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    behind = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate((before, ids, behind), dtype=np.int64, casting="unsafe")


def with_ends(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return a text that is judged: `ids` as transformers would hand them to the trained model."""
    before, behind = tokenizer.ends
    return np.concatenate((before, ids, behind), dtype=np.int64, casting="unsafe")


class ByteTokenizer:
    """256 bytes, then BOS and EOS: needs no file, reads any text, and 1 token is 1 byte."""

    vocab_size = 258
    bos_token_id, eos_token_id, pad_token_id = 256, 257, 257

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.special_ids = {self.bos_token_id: BOS, self.eos_token_id: EOS}
        self.ends: tuple[list[int], list[int]] = ([], [])
        self.special_tokens = {"bos_token": BOS, "eos_token": EOS}

    @cached_property
    def fingerprint(self) -> str:
        """Equal to that of the saved folder, which gives the same ids."""
        return _fingerprint(self._json(), self)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        return [surround(np.frombuffer(text.encode(), np.uint8), self) for text in texts]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        special = {BOS: [self.bos_token_id], EOS: [self.eos_token_id]}
        for match in re.finditer(f"{re.escape(BOS)}|{re.escape(EOS)}|.", text, re.DOTALL):
            found = special.get(match[0], list(match[0].encode()))
            ids += found
            spans += [match.span()] * len(found)
        return np.array(ids, np.int64), np.array(spans, np.int64).reshape(-1, 2)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write the same mapping as a byte-level BPE without merges, for Hugging Face readers."""
        write_text(folder / "tokenizer.json", self._json())
        write_tokenizer_config(folder, BOS, EOS)
        if self.chat_template is not None:
            write_text(folder / TEMPLATE_FILE, self.chat_template)

    def _json(self) -> str:
        tree = byte_level_json({BOS: self.bos_token_id, EOS: self.eos_token_id})
        return json.dumps(tree, indent=1) + "\n"


class FileTokenizer:
    """A Hugging Face fast tokenizer: a folder with tokenizer.json, BOS/EOS by name beside it."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """Read `folder`; a `chat_template` that is given stands in for the folder's own."""
        from tokenizers import Tokenizer as Fast

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"tokenizer={folder} has no tokenizer.json; "
                "give a folder that has one, or tokenizer=byte or tokenizer=bpe"
            )
        self._json = path.read_text(encoding="utf-8")
        try:
            self._fast = no_panic(ValueError)(Fast.from_str)(self._json)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{path} is no tokenizer: {error}; give another folder") from None
        # The file may say that texts are cut or padded, which is for the data pipeline to decide;
        # a post-processor would add special tokens, and takes spaces out of the spans of tokens.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.ends = _ends(self._fast)
        self._fast.post_processor = None
        self._config = read_tokenizer_config(folder)
        self.chat_template = chat_template or stored_template(folder, self._config)
        self.special_tokens = special_tokens(self._config)
        self.bos_token_id, self.eos_token_id = self._special("bos"), self._special("eos")
        known = (self._special("pad"), self.eos_token_id, self.bos_token_id)
        self.pad_token_id = next((i for i in known if i is not None), None)
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        added = self._fast.get_added_tokens_decoder().items()
        ends = [i for i in (self.bos_token_id, self.eos_token_id) if i is not None]
        self.special_ids = {i: token.content for i, token in added if token.special}
        self.special_ids |= {i: str(self._fast.id_to_token(i)) for i in ends}
        self.fingerprint = _fingerprint(self._json, self)

    def _special(self, kind: str) -> int | None:
        token = self.special_tokens.get(f"{kind}_token")
        if token is None:
            return None
        number = self._fast.token_to_id(token)
        if number is None:
            raise ValueError(
                f"tokenizer_config.json names {token!r} as {kind}_token, but tokenizer.json has no "
                "such token; correct one of the two files"
            )
        return number

    @no_panic(DataError)
    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._fast.encode_batch(texts, add_special_tokens=False)
        return [surround(encoding.ids, self) for encoding in encoded]

    @no_panic(DataError)
    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    @no_panic(DataError)
    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._fast.encode(text, add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int64), spans

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        write_text(folder / "tokenizer.json", self._json)
        write_json(folder / CONFIG_FILE, self._config)
        if self.chat_template and self.chat_template != configured_template(self._config):
            write_text(folder / TEMPLATE_FILE, self.chat_template)


@no_panic(ValueError)
def _ends(fast: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and behind a text."""
    whole, bare = (fast.encode("a", add_special_tokens=adds).ids for adds in (True, False))
    before = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]


def _fingerprint(tokenizer_json: str, tokenizer: Tokenizer) -> str:
    """Hash what decides how text and conversations become ids."""
    template = tokenizer.chat_template
    rendered = "" if template is None else f"{tokenizer.special_tokens}{template}"
    ends = f"{tokenizer.bos_token_id}/{tokenizer.eos_token_id}"
    return xxhash.xxh3_128_hexdigest(f"{tokenizer_json}{ends}{rendered}".encode())


def given_tokenizer(setting: str) -> ByteTokenizer | FileTokenizer:
    """Return the tokenizer of a `tokenizer=` setting that needs no training: byte or a folder."""
    return ByteTokenizer() if setting == BYTE else FileTokenizer(Path(setting).expanduser())
