"""Pretraining data: any folder of text, tokenised once, concatenated and split into packed rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from trainer.data.batching import check_share, check_sizes, loaders, rows_per_micro_batch
from trainer.data.bpe import train_bpe
from trainer.data.loader import EvalLoader, StepLoader
from trainer.data.named_sources import EVAL_KEY, Source, eval_source, key_of, named_sources
from trainer.data.rows import PackedRows
from trainer.data.sources import TextSource, open_texts
from trainer.data.tokenise import build_folder, eval_rank, tokens_of
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import BPE, FileTokenizer, Tokenizer, given_tokenizer
from trainer.data.tokens import EVAL, TRAIN, VERSION, Index, Part, TokenStore
from trainer.errors import DataError
from trainer.files import exclusive


@dataclass(frozen=True, kw_only=True)
class PretrainingData:
    """Rows of `row_tokens` tokens for causal language modelling."""

    path: str | None = None
    """Folder or file with text, jsonl, csv, parquet or arrow; hf://datasets/OWNER/NAME[@REVISION],
    of the Hub; or `stdlib`, the running Python's source files."""
    subset: str | None = None
    """Subset (config) of a data set of the Hub; None: its default."""
    split: str | None = None
    """Split of a data set of the Hub; None: train."""
    sources: dict[str, Source] | None = None
    """Several such places by name, instead of `path`, `subset` and `split`."""
    column: str = "text"
    """Column of rows that holds the text."""
    max_documents: int | None = None
    """How many documents of each place are used, the first ones; None: all."""
    eval_path: str | None = None
    """Place to evaluate on, as `path`; None: `eval_fraction` of the documents of `path`."""
    eval_subset: str | None = None
    """Subset of `eval_path`, as `subset`."""
    eval_split: str | None = None
    """Split of `eval_path`, as `split`."""
    eval_fraction: float = 0.01
    """Share of documents held out by hash of their id, when there is no eval_path."""
    row_tokens: int
    """Length of a row, in tokens."""
    global_rows: int
    """Rows of one optimizer step over all ranks: the maths."""
    micro_rows: int | None = None
    """Rows of one forward pass of one rank: the execution. None: all rows of a rank at once."""
    cache: str = "~/.cache/tessera"
    """Folder for tokenised data and trained tokenizers."""

    def __post_init__(self) -> None:
        check_sizes(
            row_tokens=self.row_tokens, global_rows=self.global_rows, micro_rows=self.micro_rows,
            max_documents=self.max_documents,
        )  # fmt: skip
        check_share(self.eval_fraction)

    @property
    def own_tokenizer(self) -> str:
        return BPE

    @property
    def labels(self) -> None:
        return None

    def rows_per_micro_batch(self, num_ranks: int) -> int:
        """Return micro_rows for this many data-parallel ranks; ValueError lists what is legal."""
        return rows_per_micro_batch(self.global_rows, self.micro_rows, num_ranks)

    def micro_batches(self, num_ranks: int) -> int:
        """Return how many micro-batches a rank has in every step."""
        return self.global_rows // (num_ranks * self.rows_per_micro_batch(num_ranks))

    @cached_property
    def named_sources(self) -> dict[str, Source]:
        return named_sources(self.path, self.sources, subset=self.subset, split=self.split)

    def _texts(self) -> dict[str, TextSource]:
        return {
            name: open_texts(source, self.column, key_of(name), self.max_documents)
            for name, source in self.named_sources.items()
        }

    def _eval_texts(self) -> TextSource | None:
        source = eval_source(self.eval_path, subset=self.eval_subset, split=self.eval_split)
        if source is None:
            return None
        return open_texts(source, self.column, EVAL_KEY, self.max_documents)

    def check(self) -> None:
        """Raise ValueError where the texts cannot serve; reads names and the first text only."""
        evaluation = self._eval_texts()
        for texts in (*self._texts().values(), *([evaluation] if evaluation else [])):
            texts.peek()

    def check_encoding(self, tokenizer: Tokenizer) -> None:
        """Do nothing: any text can be tokenised."""

    def holds_out(self) -> bool:
        return bool(self.eval_path or self.eval_fraction)

    def tokenizer(self, setting: str, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of a `tokenizer=` setting: byte, bpe (of vocab_size) or folder."""
        if setting != BPE:
            return given_tokenizer(setting)
        texts = list(self._texts().values())
        keys = [source.key() for source in texts]
        return trained_bpe(texts, vocab_size, self._cache_folder("bpe", *keys, vocab_size))

    def stores(self, tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore | None]:
        """Tokenise what is not cached yet, and open the training and the evaluation tokens."""
        parts, held_out = [], []
        for name, source in self._texts().items():
            folder, index = self._split(source, tokenizer)
            if TRAIN not in index.stores:
                raise DataError(f"{source.name}={source.path} left no training document; add some")
            parts.append(Part(folder, TRAIN, name))
            held_out += [Part(folder, EVAL, name)] if EVAL in index.stores else []
        evaluation = self._eval_texts()
        if evaluation is not None:
            folder, index = self._tokens(evaluation, tokenizer, EVAL, lambda _: EVAL)
            held_out = [Part(folder, EVAL)] if EVAL in index.stores else []
        return TokenStore(*parts), TokenStore(*held_out) if held_out else None

    def _split(self, source: TextSource, tokenizer: Tokenizer) -> tuple[Path, Index]:
        """Tokenise a source, in training and held-out documents."""
        fraction = 0.0 if self.eval_path else self.eval_fraction
        folder, index = self._tokens(source, tokenizer, fraction, hold_out(fraction))
        is_small = EVAL not in index.stores
        if fraction and is_small and TokenStore(Part(folder, TRAIN)).num_documents > 1:
            # A small corpus: its first document by hash is held out, so that there is one.
            first = min(source.documents(), key=lambda d: eval_rank(d.id)).id
            return self._tokens(
                source, tokenizer, "one", lambda name: EVAL if name == first else TRAIN
            )
        return folder, index

    def _tokens(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        split: object,
        route: Callable[[str], str],
    ) -> tuple[Path, Index]:
        """Make or find the folder of this source, tokenizer and split in the cache.

        One process: ranks wait for it, and fast tokenizers have threads of their own.
        """
        recipe = {"files": source.key(), "tokenizer": tokenizer.fingerprint, "split": split}
        folder = self._cache_folder("tokens", *recipe.values())
        progress = TokeniseProgress(source.path, source.num_bytes())
        index = build_folder(
            folder,
            recipe,
            lambda writer: tokens_of(source, tokenizer, route, writer),
            tokenizer,
            progress,
        )
        return folder, index

    def _cache_folder(self, kind: str, *parts: object) -> Path:
        key = xxhash.xxh3_128_hexdigest("/".join(map(str, (VERSION, *parts))).encode())
        return Path(self.cache).expanduser() / kind / key

    def build(
        self, *, tokenizer: Tokenizer, seed: int, rank: int, num_ranks: int
    ) -> tuple[StepLoader, EvalLoader | None]:
        """Return the loaders of one data-parallel rank."""
        train, evaluation = self.stores(tokenizer)
        return loaders(
            PackedRows(train, self.row_tokens),
            PackedRows(evaluation, self.row_tokens) if evaluation else None,
            self.named_sources, global_samples=self.global_rows,
            micro_rows=self.rows_per_micro_batch(num_ranks), seed=seed, rank=rank,
            num_ranks=num_ranks,
        )  # fmt: skip


def hold_out(fraction: float) -> Callable[[str], str]:
    """Return which store a document of an id belongs to: this share is held out, by its hash."""
    return lambda document_id: EVAL if eval_rank(document_id) < fraction else TRAIN


def trained_bpe(sources: list[TextSource], vocab_size: int, folder: Path) -> Tokenizer:
    """Return the BPE of a corpus; it is trained into `folder` once, by one process."""
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / "lock"):
            if not (folder / "tokenizer.json").exists():
                texts = (document.text for one in sources for document in one.documents())
                train_bpe(folder, texts, vocab_size)
    return FileTokenizer(folder)
