"""From texts to a folder of shards: the work of `tessera tokenize` and of a run's own cache."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from trainer.data.encoders import Encoders
from trainer.data.folder_writer import FolderWriter, claim, is_complete
from trainer.data.shard_writer import NOTHING
from trainer.data.shards import Vocabulary
from trainer.data.sources import TextSource
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import Tokenizer
from trainer.data.tokens import Index
from trainer.files import exclusive, make_folder

log = logging.getLogger(__name__)
SHARD_TOKENS = 1 << 28  # 0.5 or 1 GB: what a kill can cost, against the number of files
_CHUNK_BYTES, _CHUNK_DOCUMENTS = 1 << 20, 1024  # of text, in one message to a worker


class Written(NamedTuple):
    """One document on its way into a folder."""

    store: str
    tokens: np.ndarray
    num_bytes: int
    """UTF-8 bytes of its text; 0: unknown."""
    extra: Mapping[str, np.ndarray] = NOTHING
    """Its part of sections by other names."""


Tokens = Iterator[Written]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return what shards say about ids of `tokenizer.encode_documents`."""
    return Vocabulary(
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def eval_rank(document_id: str) -> float:
    """Return a number in [0, 1) by hash of the id; a document below the share is held out."""
    return xxhash.xxh3_64_intdigest(document_id.encode()) / 2**64


def build_folder(
    folder: Path,
    recipe: dict[str, Any],
    documents: Callable[[FolderWriter], Tokens],
    tokenizer: Tokenizer,
    progress: TokeniseProgress,
    *,
    vocabulary: Vocabulary | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Index:
    """Make `folder` hold all tokens, unless it does; return its index.

    `documents` yields what the writer wants. Safe to call from any number of processes of a
    machine: one builds, the others wait for it. What a stopped one finished is kept. ValueError if
    the folder was begun from another `recipe`, or cannot be made.
    """
    if is_complete(folder):  # without the lock: the folder may be read-only
        claim(folder, recipe)
        return Index.read(folder)
    make_folder(folder, "data.cache")

    def on_wait() -> None:
        log.info("waiting for another process of this machine, which makes %s", folder)

    with exclusive(folder / "lock", on_wait):
        claim(folder, recipe)
        if is_complete(folder):
            return Index.read(folder)
        tokenizer.save(folder)
        writer = FolderWriter(folder, vocabulary or vocabulary_of(tokenizer), shard_tokens)
        try:
            with progress:
                for document in documents(writer):
                    writer.add(*document)
                    progress.advance(len(document.tokens), document.num_bytes)
        except BaseException:
            writer.abort()
            raise
        return writer.finish()


def tokens_of(
    source: TextSource,
    tokenizer: Tokenizer,
    route: Callable[[str], str],
    writer: FolderWriter,
    *,
    workers: int = 1,
) -> Tokens:
    """Tokenise the wanted documents of `source` with `workers` processes (1: in this one)."""

    def wanted() -> Iterator[tuple[str, str]]:
        for document in source.documents():
            name = route(document.id)
            if writer.wants(name):
                yield name, document.text

    with Encoders(tokenizer, writer.vocabulary.dtype, workers) as encoders:
        for names, encoded in encoders.encode(_chunks(wanted())):
            stops = np.cumsum(encoded.lengths)
            parts = np.split(encoded.tokens, stops[:-1])
            yield from map(Written, names, parts, encoded.num_bytes.tolist())


def _chunks(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    """Group (name, text) pairs into messages of about a mebibyte."""
    names: list[str] = []
    chunk: list[str] = []
    size = 0
    for name, text in texts:
        names.append(name)
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS:
            yield names, chunk
            names, chunk, size = [], [], 0
    if chunk:
        yield names, chunk
