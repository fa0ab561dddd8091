"""Fine-tuning data: every row becomes one document, and documents are packed within each step."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from trainer.data.bad_rows import BadRows
from trainer.data.batching import check_share, check_sizes, loaders
from trainer.data.document_store import DocumentStore, no_targets, sections
from trainer.data.documents import PackedDocuments
from trainer.data.examples import BadRowError, Encoder, Labels
from trainer.data.folder_writer import FolderWriter
from trainer.data.label_names import label_names
from trainer.data.loader import EvalLoader, StepLoader
from trainer.data.named_sources import Source, key_of, named_sources
from trainer.data.pretraining import hold_out
from trainer.data.sources import STANDARD_LIBRARY, TextSource
from trainer.data.tokenise import Tokens, Written, build_folder
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import BPE, BYTE, Tokenizer, given_tokenizer
from trainer.data.tokens import EVAL, TRAIN, VERSION, Part
from trainer.errors import DataError

log = logging.getLogger(__name__)
SHARD_TOKENS = 1 << 24  # labels of a shard are in memory until it is closed
BAD = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class DocumentData:
    """Documents that an encoder makes of rows: conversations, prompts with completions, texts,
    texts with classes, words with tags."""

    path: str | None = None
    """Folder or file with jsonl, csv, parquet or arrow."""
    sources: dict[str, Source] | None = None
    """Several such places by name, instead of `path`."""
    encoder: Encoder
    """Makes documents of rows, with what is to be learnt of each token."""
    eval_path: str | None = None
    """Folder or file to evaluate on; None: `eval_fraction` of the rows of `path`."""
    eval_fraction: float = 0.01
    """Share of rows held out by hash of their content, when there is no eval_path."""
    row_tokens: int
    """Length of a row, in tokens: the longest document."""
    global_documents: int
    """Documents of one optimizer step over all ranks: the maths."""
    micro_rows: int = 1
    """Rows of one forward pass of one rank: the execution."""
    packing: Literal["best_fit", "off"] = "best_fit"
    """Whether several documents of a step share a row; the losses are the same."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """What happens to documents longer than a row; `cut` keeps their first row_tokens tokens."""
    cache: str = "~/.cache/tessera"
    """Folder for tokenised data."""

    def __post_init__(self) -> None:
        check_sizes(
            row_tokens=self.row_tokens,
            global_documents=self.global_documents,
            micro_rows=self.micro_rows,
        )
        check_share(self.eval_fraction)

    @property
    def own_tokenizer(self) -> str:
        return BYTE

    def micro_batches(self, num_ranks: int) -> int | None:
        """Return how many micro-batches a rank has in every step: it varies with the lengths."""
        return None

    def check(self) -> None:
        """Raise ValueError where the files cannot serve; reads names and the first row only."""
        for name, source in self.named_sources.items():
            self._check_first(key_of(name), source.path)
        if self.eval_path is not None:
            self._check_first("data.eval_path", self.eval_path)

    def _check_first(self, key: str, path: str) -> None:
        if path == STANDARD_LIBRARY:
            raise ValueError(f"{key}=stdlib holds no rows; give a folder or file of jsonl")
        row = next(TextSource(path, "", key).rows(), None)
        if row is None:
            raise ValueError(f"{key}={path} holds no rows; give a file that has some")
        self.encoder.check(row, f"{key}={path}")

    def holds_out(self) -> bool:
        return bool(self.eval_path or self.eval_fraction)

    @property
    def labels(self) -> Labels | None:
        return self._encoder.outputs

    @cached_property
    def _encoder(self) -> Encoder:
        """The encoder with its labels, which are looked up in the training data if need be."""

        def find(column: str) -> tuple[str, ...]:
            sources = [TextSource(source.path, "") for source in self.named_sources.values()]
            return label_names(sources, column, cache=self._cache)

        return self.encoder.with_labels(find)

    @cached_property
    def named_sources(self) -> dict[str, Source]:
        return named_sources(self.path, self.sources)

    @property
    def _cache(self) -> Path:
        return Path(self.cache).expanduser()

    def tokenizer(self, setting: str, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of a `tokenizer=` setting: byte or a folder."""
        if setting == BPE:
            raise ValueError("tokenizer=bpe is trained on plain text; give a folder, or byte")
        return given_tokenizer(setting)

    def build(
        self, *, tokenizer: Tokenizer, seed: int, rank: int, num_ranks: int
    ) -> tuple[StepLoader, EvalLoader | None]:
        """Return the loaders of one data-parallel rank; DataError for documents that do not fit."""
        fraction = 0.0 if self.eval_path else self.eval_fraction
        parts, held_out = [], []
        for name, one in self.named_sources.items():
            folder, kinds = self._folder(one.path, tokenizer, fraction, hold_out(fraction))
            if TRAIN not in kinds:
                raise DataError(f"{key_of(name)}={one.path} left no training document; add rows")
            parts.append(Part(folder, TRAIN, name))
            held_out += [Part(folder, EVAL, name)] if EVAL in kinds else []
        if self.eval_path:
            folder, kinds = self._folder(self.eval_path, tokenizer, EVAL, lambda _: EVAL)
            held_out = [Part(folder, EVAL)] if EVAL in kinds else []
        return loaders(
            self._rows(parts, TRAIN), self._rows(held_out, EVAL) if held_out else None,
            self.named_sources, global_samples=self.global_documents,
            micro_rows=self.micro_rows, seed=seed, rank=rank, num_ranks=num_ranks,
        )  # fmt: skip

    def _rows(self, parts: list[Part], name: str) -> PackedDocuments:
        store = DocumentStore(*parts)
        lengths = store.all_lengths()
        too_long = lengths > self.row_tokens
        if too_long.any():
            lost = int((lengths[too_long] - self.row_tokens).sum())
            found = (
                f"{too_long.sum()} of {len(lengths)} documents ({name}) are longer than "
                f"data.row_tokens={self.row_tokens}, the longest has {lengths.max()}"
            )
            if self.too_long == "refuse":
                raise DataError(
                    f"{found}; raise data.row_tokens, or set data.too_long=cut, which loses "
                    f"{lost} of {lengths.sum()} tokens"
                )
            log.info("%s: cut, %d of %d tokens are lost", found, lost, lengths.sum())
        return PackedDocuments(store, self.row_tokens, is_packed=self.packing == "best_fit")

    def _folder(
        self, path: str, tokenizer: Tokenizer, split: object, route: Callable[[str], str]
    ) -> tuple[Path, list[str]]:
        """Make or find the documents of `path` in the cache; return their folder and stores."""
        source = TextSource(path, "")
        recipe = {
            "files": source.key(),
            "tokenizer": tokenizer.fingerprint,
            "encoder": f"{type(self.encoder).__name__}/{_settings(self._encoder)}",
            "split": split,
        }
        key = xxhash.xxh3_128_hexdigest(json.dumps([VERSION, recipe]).encode())
        folder = self._cache / "documents" / key
        index = build_folder(
            folder, recipe, lambda writer: self._documents(source, tokenizer, route, writer),
            tokenizer, TokeniseProgress(path, source.num_bytes()), shard_tokens=SHARD_TOKENS,
        )  # fmt: skip
        return folder, list(index.stores)

    def _documents(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        route: Callable[[str], str],
        writer: FolderWriter,
    ) -> Tokens:
        bad_rows, encoder = BadRows(writer.folder, source.path), self._encoder
        for row in source.rows():
            name = route(xxhash.xxh3_128_hexdigest(json.dumps(row, default=str).encode()))
            try:
                example = encoder.encode(row, tokenizer)
            except BadRowError as error:
                bad_rows.bad(str(error))
                document = Written(name, BAD, 0, no_targets(encoder.outputs))
            else:
                bad_rows.good(example.notes)
                document = Written(name, example.input_ids, example.num_bytes, sections(example))
            if writer.wants(name):
                yield document
        bad_rows.finish()


def _settings(encoder: Any) -> str:
    return json.dumps(asdict(encoder), sort_keys=True)
