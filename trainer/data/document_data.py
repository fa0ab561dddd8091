"""Fine-tuning data: every row becomes one document, and documents are packed within each step."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from trainer.data.bad_rows import BadRows
from trainer.data.batching import check_sizes, eval_loader, loaders
from trainer.data.document_lengths import check_lengths
from trainer.data.document_store import DocumentStore, no_targets, sections
from trainer.data.documents import PackedDocuments
from trainer.data.eval_loader import EvalLoader
from trainer.data.examples import BadRowError, Encoder, Example, Labels, described
from trainer.data.folder_writer import FolderWriter
from trainer.data.label_names import label_names
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.places import Places, Route
from trainer.data.preferences import PreferenceEncoder
from trainer.data.sources import RowSource, first_row, open_rows
from trainer.data.tokenise import Tokens, Written, build_folder
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import BPE, ByteTokenizer, Tokenizer
from trainer.data.tokens import EVAL, TRAIN, VERSION, Part

SHARD_TOKENS = 1 << 24  # labels of a shard are in memory until it is closed
BAD = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class DocumentData(Places[RowSource]):
    """Documents that an encoder makes of rows: conversations, prompts with completions, texts,
    texts with classes, words with tags."""

    encoder: Encoder
    """Makes documents of rows, with what is to be learnt of each token."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            row_tokens=self.row_tokens, global_documents=self.global_documents,
            micro_rows=self.micro_rows, max_documents=self.max_documents,
        )  # fmt: skip

    @property
    def own_tokenizer(self) -> str:
        return BPE

    def micro_batches(self, num_ranks: int) -> int | None:
        """Return how many micro-batches a rank has in every step: it varies with the lengths."""
        return None

    @cached_property
    def _first_rows(self) -> list[tuple[RowSource, dict[str, Any]]]:
        """The first row of every place, which may be far away: read once."""
        return [(place, first_row(place)) for place in self.all_places]

    def check(self) -> None:
        """Raise ValueError where the rows cannot serve; reads names and the first row only."""
        for place, row in self._first_rows:
            self.encoder.check(row, f"{place.name}={place.path}")
        if self.too_long == "cut" and isinstance(self.encoder, PreferenceEncoder):
            raise ValueError(
                "data.too_long=cut would cut rejected texts alone; set data.encoder.max_tokens, "
                "of each text, to half of data.row_tokens or less"
            )

    def check_encoding(self, tokenizer: Tokenizer | None) -> None:
        """Raise ValueError where the tokenizer lacks what the first row needs."""
        tokenizer = tokenizer or self.speller
        for _, row in self._first_rows:
            with suppress(BadRowError):  # as any other bad row: counted when all are read
                self._encoder.encode(row, tokenizer)

    def check_virtual(self, ids: Sequence[int]) -> None:
        if ids and isinstance(self.encoder, PreferenceEncoder):
            raise ValueError(
                "adapter=prompt puts virtual tokens before documents, and a pair is one document "
                "of two texts; set adapter=lora"
            )
        if ids and self.row_tokens <= len(ids):
            raise ValueError(
                f"data.row_tokens={self.row_tokens} leaves no place behind {len(ids)} virtual "
                "tokens; raise it, or lower adapter.num_virtual_tokens"
            )

    @property
    def labels(self) -> Labels | None:
        return self._encoder.outputs

    @property
    def image_size(self) -> int | None:
        return None

    @cached_property
    def _encoder(self) -> Encoder:
        """The encoder with its labels, which are looked up in the training data if need be."""

        def find(column: str) -> tuple[str, ...]:
            return label_names(list(self.places.values()), column, cache=self.cache_folder)

        return self.encoder.with_labels(find)

    def open_place(self, source: Source, key: str) -> RowSource:
        return open_rows(source, key, self.max_documents)

    @property
    def text_settings(self) -> tuple[str, ...]:
        return (described(self._encoder),)

    @property
    def speller(self) -> Tokenizer:
        """Makes documents of rows before there is a tokenizer, byte by byte."""
        return ByteTokenizer()

    def texts(self) -> Iterator[str]:
        """Yield what documents say between images: rows of any shape, by their bytes as tokens."""
        speller, plain, encoder = self.speller, ByteTokenizer(), self._encoder
        if isinstance(encoder, PreferenceEncoder):
            encoder = replace(encoder, max_tokens=None)  # of bytes it would cut most texts
        for place in self.places.values():
            for row in place.rows():
                with suppress(BadRowError):
                    ids = encoder.encode(row, speller).input_ids
                    for part in np.split(ids, np.flatnonzero(ids >= plain.vocab_size)):
                        yield plain.decode(part.tolist())

    def build(
        self,
        *,
        tokenizer: Tokenizer,
        seed: int,
        rank: int,
        num_ranks: int,
        virtual_ids: Sequence[int] = (),
    ) -> tuple[StepLoader, EvalLoader | None]:
        """Return the loaders of one data-parallel rank; DataError for documents that do not fit."""
        parts, held_out = self.parts(tokenizer)
        return loaders(
            self._rows(parts, TRAIN, tokenizer, virtual_ids),
            self._rows(held_out, EVAL, tokenizer, virtual_ids) if held_out else None,
            self.named_sources, global_samples=self.global_documents,
            micro_rows=self.micro_rows, seed=seed, rank=rank, num_ranks=num_ranks,
        )  # fmt: skip

    def build_eval(
        self, *, tokenizer: Tokenizer, virtual_ids: Sequence[int] = ()
    ) -> EvalLoader | None:
        parts = self.eval_parts(tokenizer)
        rows = self._rows(parts, EVAL, tokenizer, virtual_ids) if parts else None
        return eval_loader(rows, self.micro_rows)

    def _rows(
        self, parts: list[Part], name: str, tokenizer: Tokenizer, virtual_ids: Sequence[int]
    ) -> PackedDocuments:
        self.check_virtual(virtual_ids)
        store = DocumentStore(*parts)
        check_lengths(
            store, name, row_tokens=self.row_tokens, num_virtual=len(virtual_ids),
            is_cut=self.too_long == "cut",
        )  # fmt: skip
        return self.packed(store, tokenizer, virtual_ids)

    def packed(
        self, store: DocumentStore, tokenizer: Tokenizer, virtual_ids: Sequence[int]
    ) -> PackedDocuments:
        """Return the rows of documents, each of which fits one behind the virtual tokens."""
        return PackedDocuments(
            store, self.row_tokens, is_packed=self.packing == "best_fit", virtual_ids=virtual_ids,
            is_text=self.labels is None,
        )  # fmt: skip

    @property
    def limits(self) -> dict[str, Any]:
        """What decides, beside rows, tokenizer and encoder, which documents are made."""
        return {}

    def document(self, row: dict[str, Any], place: RowSource, tokenizer: Tokenizer) -> Example:
        """Return the document of a row of a place; BadRowError for one that has none."""
        return self._encoder.encode(row, tokenizer)

    def no_document(self) -> dict[str, np.ndarray]:
        """Return the sections of what stands in the place of a bad row."""
        return no_targets(self._encoder.outputs)

    def folder_of(
        self, place: RowSource, tokenizer: Tokenizer, split: object
    ) -> tuple[Path, dict[str, Any]]:
        """Return where the documents of a place lie once they are made, and what decides them."""
        recipe = {
            "files": place.key(),
            "tokenizer": tokenizer.fingerprint,
            "encoder": described(self._encoder),
            "split": split,
            **self.limits,
        }
        key = xxhash.xxh3_128_hexdigest(json.dumps([VERSION, recipe]).encode())
        return self.cache_folder / "documents" / key, recipe

    def make(
        self, place: RowSource, tokenizer: Tokenizer, split: object, route: Route
    ) -> tuple[Path, list[str]]:
        folder, recipe = self.folder_of(place, tokenizer, split)
        index = build_folder(
            folder, recipe, lambda writer: self._documents(place, tokenizer, route, writer),
            tokenizer, TokeniseProgress(place.path, None), shard_tokens=SHARD_TOKENS,
        )  # fmt: skip
        return folder, list(index.stores)

    def _documents(
        self, source: RowSource, tokenizer: Tokenizer, route: Route, writer: FolderWriter
    ) -> Tokens:
        bad_rows = BadRows(writer.folder, source.path)
        for row in source.rows():
            name = route(xxhash.xxh3_128_hexdigest(json.dumps(row, default=str).encode()))
            try:
                example = self.document(row, source, tokenizer)
            except BadRowError as error:
                bad_rows.bad(str(error))
                if name == EVAL:  # no order to keep: the next one would be judged twice
                    continue
                document = Written(name, BAD, 0, self.no_document())
            else:
                bad_rows.good(example.notes)
                document = Written(name, example.input_ids, example.num_bytes, sections(example))
            if writer.wants(name):
                yield document
        bad_rows.finish()
