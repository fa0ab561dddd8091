"""Pretraining data: any folder of text, tokenised once, concatenated and split into packed rows."""

from dataclasses import dataclass
from pathlib import Path

import xxhash

from trainer.data.loader import EvalLoader, StepLoader
from trainer.data.rows import PackedRows
from trainer.data.sources import TextSource
from trainer.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from trainer.data.tokens import VERSION, Document, TokenStore, build_stores, eval_rank
from trainer.errors import DataError
from trainer.files import exclusive


@dataclass(frozen=True, kw_only=True)
class PretrainingData:
    """Rows of `row_tokens` tokens for causal language modelling."""

    path: str
    """Folder or file with text, jsonl or parquet; `stdlib`: the running Python's source files."""
    column: str = "text"
    """Column of jsonl and parquet files that holds the text."""
    eval_path: str | None = None
    """Folder or file to evaluate on; None: `eval_fraction` of the documents of `path`."""
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
        for name in ("row_tokens", "global_rows", "micro_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} is not positive; set it to 1 or more")
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ValueError(
                f"data.eval_fraction={self.eval_fraction} is no share below 1; "
                "set it to 0 or more and less than 1"
            )

    def rows_per_micro_batch(self, num_ranks: int) -> int:
        """Return micro_rows for this many data-parallel ranks; ValueError lists what is legal."""
        if self.global_rows % num_ranks:
            raise ValueError(
                f"data.global_rows={self.global_rows} is not divisible by {num_ranks} "
                f"data-parallel ranks; run on {_divisors(self.global_rows)} ranks or set "
                f"data.global_rows to a multiple of {num_ranks}"
            )
        rank_rows = self.global_rows // num_ranks
        micro_rows = self.micro_rows or rank_rows
        if rank_rows % micro_rows:
            raise ValueError(
                f"data.micro_rows={micro_rows} does not divide the {rank_rows} rows of each of "
                f"{num_ranks} ranks; set it to one of {_divisors(rank_rows)}"
            )
        return micro_rows

    def check(self) -> None:
        """Raise ValueError where the files cannot serve; reads names and the first row only."""
        TextSource(self.path, self.column).peek()
        if self.eval_path is not None:
            TextSource(self.eval_path, self.column, "data.eval_path").peek()

    def tokenizer(self, setting: str, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of a `tokenizer=` setting: byte, bpe (of vocab_size) or folder."""
        if setting == "byte":
            return ByteTokenizer()
        if setting != "bpe":
            return FileTokenizer(Path(setting).expanduser())
        source = TextSource(self.path, self.column)
        folder = self._cache_folder("bpe", source.key(), vocab_size)
        if not (folder / "tokenizer.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / "lock"):
                if not (folder / "tokenizer.json").exists():
                    texts = (document.text for document in source.documents())
                    train_bpe(folder, texts, vocab_size)
        return FileTokenizer(folder)

    def stores(self, tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore | None]:
        """Tokenise what is not cached yet, and open the training and the evaluation tokens."""
        source = TextSource(self.path, self.column)
        fraction = 0.0 if self.eval_path else self.eval_fraction

        def route(document: Document) -> str:
            return "eval" if eval_rank(document.id) < fraction else "train"

        folder = self._cache_folder("tokens", source.key(), tokenizer.fingerprint, fraction)
        build_stores(folder, source.documents, tokenizer, route)
        is_split = not fraction or (folder / "eval.json").exists()
        if not is_split and TokenStore(folder, "train").num_documents > 1:
            # A small corpus: its first document by hash is held out, so that there is one.
            first = min(source.documents(), key=lambda d: eval_rank(d.id)).id
            folder = self._cache_folder("tokens", source.key(), tokenizer.fingerprint, "one")
            build_stores(
                folder, source.documents, tokenizer, lambda d: "eval" if d.id == first else "train"
            )
        if not (folder / "train.json").exists():
            raise DataError(f"data.path={self.path} left no training document; add documents")
        evaluation = folder
        if self.eval_path is not None:
            source = TextSource(self.eval_path, self.column)
            evaluation = self._cache_folder("tokens", source.key(), tokenizer.fingerprint, "eval")
            build_stores(evaluation, source.documents, tokenizer, lambda _: "eval")
        has_eval = (evaluation / "eval.json").exists()
        return TokenStore(folder, "train"), TokenStore(evaluation, "eval") if has_eval else None

    def _cache_folder(self, kind: str, *parts: object) -> Path:
        key = xxhash.xxh3_128_hexdigest("/".join(map(str, (VERSION, *parts))).encode())
        return Path(self.cache).expanduser() / kind / key

    def build(
        self, *, tokenizer: Tokenizer, seed: int, rank: int, num_ranks: int
    ) -> tuple[StepLoader, EvalLoader | None]:
        """Return the loaders of one data-parallel rank."""
        train, evaluation = self.stores(tokenizer)
        micro_rows = self.rows_per_micro_batch(num_ranks)
        loader = StepLoader(
            rows=PackedRows(train, self.row_tokens),
            seed=seed,
            global_rows=self.global_rows,
            micro_rows=micro_rows,
            rank=rank,
            num_ranks=num_ranks,
        )
        if evaluation is None:
            return loader, None
        rows = PackedRows(evaluation, self.row_tokens)
        return loader, EvalLoader(rows=rows, micro_rows=micro_rows, rank=rank, num_ranks=num_ranks)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
