"""What `tessera tokenize` is asked for: checked before it starts, then done."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.batching import check_share, check_sizes
from trainer.data.bpe import trained_bpe
from trainer.data.folder_writer import claim, refuse_other
from trainer.data.megatron import open_megatron
from trainer.data.named_sources import Source
from trainer.data.places import hold_out
from trainer.data.sources import TextSource, open_texts
from trainer.data.tokenise import SHARD_TOKENS, build_folder, tokens_of, vocabulary_of
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import BPE, Tokenizer, given_tokenizer
from trainer.data.tokens import VERSION, Index


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is tokenised; the same names as in a run."""

    path: str | None = None
    """Folder or file with text, jsonl, csv, parquet or arrow; hf://datasets/OWNER/NAME[@REVISION],
    of the Hub; or `stdlib`, the running Python's source files."""
    subset: str | None = None
    """Subset (config) of a data set of the Hub; None: its default."""
    split: str | None = None
    """Split of a data set of the Hub; None: train."""
    column: str = "text"
    """Column of rows that holds the text."""
    max_documents: int | None = None
    """How many documents are used, the first ones; None: all."""
    eval_fraction: float = 0.01
    """Share of documents held out by hash of their content."""


@dataclass(frozen=True, kw_only=True)
class TokeniseJob:
    """One call of the command."""

    output: str
    """Folder for the shards: new, or begun by the same call."""
    tokenizer: str
    """`byte`, `bpe` (trained on the texts) or a folder with tokenizer.json."""
    data: Texts = field(default_factory=Texts)
    megatron: str | None = None
    """Import PREFIX.bin and PREFIX.idx, which `tokenizer` made, in place of texts."""
    vocab_size: int | None = None
    """Tokens of tokenizer=bpe."""
    workers: int | None = None
    """Processes; None: one per core."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens after which a shard ends, with its last document."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "workers", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; set it to 1 or more")
        check_sizes(max_documents=self.data.max_documents)
        check_share(self.data.eval_fraction)
        if (self.data.path is None) == (self.megatron is None):
            raise ValueError("give either data.path=TEXT or megatron=PREFIX, and not both")
        if (self.tokenizer == BPE) != (self.vocab_size is not None):
            raise ValueError(
                f"vocab_size={self.vocab_size} with tokenizer={self.tokenizer}: "
                "it belongs to tokenizer=bpe, which needs it"
            )
        if self.megatron and (self.tokenizer == BPE or self.workers is not None):
            raise ValueError(
                "megatron= brings tokens: give the tokenizer that made them, and no workers="
            )
        if self.megatron and self.data != Texts(eval_fraction=self.data.eval_fraction):
            raise ValueError(
                "megatron= brings tokens, so settings of data. have no effect but "
                "data.eval_fraction; leave them out"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()

    @property
    def num_workers(self) -> int:
        return 1 if self.megatron else self.workers or len(os.sched_getaffinity(0))

    def check(self) -> str:
        """Raise ValueError or DataError for what cannot work; return the work in words."""
        if self.megatron:
            files = open_megatron(self.megatron)
            work = f"{files.num_documents:,} documents of {files.path}"
        else:
            source = self._source()
            source.peek()
            work = source.in_words()
        if self.tokenizer != BPE:
            self._tokenizer()
        refuse_other(self.folder, self._recipe())
        return work

    def prepare(self) -> None:
        """Begin the folder, and train the tokenizer where that is asked for, with all cores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        claim(self.folder, self._recipe())
        self._tokenizer()

    def run(self) -> tuple[Index, TokeniseProgress]:
        """Do it, or what is left of it; return the index, and what this call did."""
        self.prepare()
        recipe = self._recipe()
        tokenizer = self._tokenizer()
        route = hold_out(self.data.eval_fraction)
        if self.megatron:
            files = open_megatron(self.megatron)
            progress = TokeniseProgress(str(files.path), None)
            index = build_folder(
                self.folder, recipe, lambda writer: files.documents(route, writer), tokenizer,
                progress, vocabulary=files.vocabulary(vocabulary_of(tokenizer)),
                shard_tokens=self.shard_tokens,
            )  # fmt: skip
            return index, progress
        source = self._source()
        progress = TokeniseProgress(source.path, source.num_bytes())
        index = build_folder(
            self.folder, recipe,
            lambda writer: tokens_of(source, tokenizer, route, writer, workers=self.num_workers),
            tokenizer, progress, shard_tokens=self.shard_tokens,
        )  # fmt: skip
        return index, progress

    def _source(self) -> TextSource:
        data = self.data
        assert data.path is not None
        source = Source(path=data.path, subset=data.subset, split=data.split)
        return open_texts(source, data.column, limit=data.max_documents)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer != BPE:
            return given_tokenizer(self.tokenizer)
        assert self.vocab_size is not None
        texts = (document.text for document in self._source().documents())
        return trained_bpe(texts, self.vocab_size, self.folder / BPE)

    def _recipe(self) -> dict[str, Any]:
        """Return all that decides the bytes of the shards: not the number of workers."""
        files = open_megatron(self.megatron) if self.megatron else self._source()
        is_bpe = self.tokenizer == BPE
        return {
            "version": VERSION,
            "data.path": files.place,
            "data.subset": self.data.subset,
            "data.split": self.data.split,
            "data.max_documents": self.data.max_documents,
            "data.eval_fraction": self.data.eval_fraction,
            "tokenizer": f"bpe/{self.vocab_size}" if is_bpe else self._tokenizer().fingerprint,
            "shard_tokens": self.shard_tokens,
            "hash of all files' sizes and times": files.key(),
        }
