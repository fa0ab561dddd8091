"""Tokens on disk: a flat memory-mapped stream with its document borders, built once and cached."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from trainer.data.tokenizers import Tokenizer
from trainer.errors import DataError
from trainer.files import exclusive, fsync_folder, write_json

VERSION = 2  # part of every cache key: raise it when what is written for the same input changes


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of the corpus, with an id that does not depend on the order of reading."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Meta:
    num_tokens: int
    num_documents: int
    num_bytes: int
    dtype: str
    xxh3_128: str
    tokenizer: str


class TokenStore:
    """A memory-mapped token stream. `num_bytes` counts the UTF-8 bytes of its source texts."""

    def __init__(self, folder: Path, name: str) -> None:
        meta = _Meta(**json.loads((folder / f"{name}.json").read_text()))
        self.name = name
        self.num_tokens, self.num_documents = meta.num_tokens, meta.num_documents
        self.num_bytes = meta.num_bytes
        self.fingerprint = meta.xxh3_128
        self.document_starts = np.load(folder / f"{name}.starts.npy", allow_pickle=False)
        path = folder / f"{name}.bin"
        expected = meta.num_tokens * np.dtype(meta.dtype).itemsize
        if path.stat().st_size != expected:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, its index says {expected}; "
                f"delete {folder} and start again"
            )
        self._tokens = (
            np.memmap(path, meta.dtype, "r") if meta.num_tokens else np.empty(0, meta.dtype)
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64."""
        return self._tokens[start:stop].astype(np.int64)


def eval_rank(document_id: str) -> float:
    """Return a number in [0, 1) by hash of the id; a document below the share is held out."""
    return xxhash.xxh3_64_intdigest(document_id.encode()) / 2**64


def build_stores(
    folder: Path,
    documents: Callable[[], Iterable[Document]],
    tokenizer: Tokenizer,
    route: Callable[[Document], str],
) -> None:
    """Write one store per name that `route` gives, unless `folder` is complete already.

    Safe to call from any number of processes of a machine: one builds, the others wait for it.
    """
    if (folder / "COMPLETE").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock"):
        if (folder / "COMPLETE").exists():
            return
        writers: dict[str, _StoreWriter] = {}
        for batch in _batches(documents(), 256):
            names = [route(document) for document in batch]
            encoded = tokenizer.encode_documents([document.text for document in batch])
            for document, name, ids in zip(batch, names, encoded, strict=True):
                if name not in writers:
                    writers[name] = _StoreWriter(folder, name, tokenizer)
                writers[name].add(ids, len(document.text.encode()))
        for writer in writers.values():
            writer.close()
        fsync_folder(folder)
        (folder / "COMPLETE").touch()


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _StoreWriter:
    """Append documents to `name.bin`, hashing on the way; `close` writes borders and index."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.file = open(folder / f"{name}.bin", "wb")  # noqa: SIM115  closed in close()
        self.hash = xxhash.xxh3_128()
        self.starts = [0]
        self.num_bytes = 0

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.starts.append(self.starts[-1] + len(ids))
        self.num_bytes += num_bytes

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with open(self.folder / f"{self.name}.starts.npy", "wb") as file:
            np.save(file, np.array(self.starts, np.int64))
            file.flush()
            os.fsync(file.fileno())
        meta = _Meta(
            num_tokens=self.starts[-1],
            num_documents=len(self.starts) - 1,
            num_bytes=self.num_bytes,
            dtype=self.dtype.str,
            xxh3_128=self.hash.hexdigest(),
            tokenizer=self.tokenizer.fingerprint,
        )
        write_json(self.folder / f"{self.name}.json", asdict(meta))
