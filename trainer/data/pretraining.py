"""Pretraining data: any folder of text, tokenised once, concatenated and split into packed rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.batching import (
    check_sizes,
    eval_loader,
    loaders,
    refuse_virtual,
    rows_per_micro_batch,
)
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source
from trainer.data.places import Places, Route
from trainer.data.rows import PackedRows
from trainer.data.sources import TextSource, open_texts
from trainer.data.tokenise import build_folder, eval_rank, tokens_of
from trainer.data.tokenise_progress import TokeniseProgress
from trainer.data.tokenizers import BPE, Tokenizer
from trainer.data.tokens import EVAL, TRAIN, Part, TokenStore


@dataclass(frozen=True, kw_only=True)
class PretrainingData(Places[TextSource]):
    """Rows of `row_tokens` tokens for causal language modelling."""

    column: str = "text"
    """Column of rows that holds the text."""
    row_tokens: int
    """Length of a row, in tokens."""
    global_rows: int
    """Rows of one optimizer step over all ranks: the maths."""
    micro_rows: int | None = None
    """Rows of one forward pass of one rank: the execution. None: all rows of a rank at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            row_tokens=self.row_tokens, global_rows=self.global_rows, micro_rows=self.micro_rows,
            max_documents=self.max_documents,
        )  # fmt: skip

    @property
    def own_tokenizer(self) -> str:
        return BPE

    @property
    def labels(self) -> None:
        return None

    @property
    def image_size(self) -> None:
        return None

    def rows_per_micro_batch(self, num_ranks: int) -> int:
        """Return micro_rows for this many data-parallel ranks; ValueError lists what is legal."""
        return rows_per_micro_batch(self.global_rows, self.micro_rows, num_ranks)

    def micro_batches(self, num_ranks: int) -> int:
        """Return how many micro-batches a rank has in every step."""
        return self.global_rows // (num_ranks * self.rows_per_micro_batch(num_ranks))

    def open_place(self, source: Source, key: str) -> TextSource:
        return open_texts(source, self.column, key, self.max_documents)

    def check(self) -> None:
        """Raise ValueError where the texts cannot serve; reads names and the first text only."""
        for texts in self.all_places:
            texts.peek()

    def check_encoding(self, tokenizer: Tokenizer | None) -> None:
        """Do nothing: any text can be tokenised."""

    def texts(self) -> Iterator[str]:
        return (each.text for place in self.places.values() for each in place.documents())

    def stores(self, tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore | None]:
        """Tokenise what is not cached yet, and open the training and the evaluation tokens."""
        training, held_out = self.parts(tokenizer)
        return TokenStore(*training), TokenStore(*held_out) if held_out else None

    def make_split(self, place: TextSource, tokenizer: Tokenizer) -> tuple[Path, list[str]]:
        folder, stores = super().make_split(place, tokenizer)
        is_small = not self.eval_path and self.eval_fraction and EVAL not in stores
        if is_small and TokenStore(Part(folder, TRAIN)).num_documents > 1:
            # A small corpus: its first document by hash is held out, so that there is one.
            first = min(place.documents(), key=lambda d: eval_rank(d.id)).id
            return self.make(place, tokenizer, "one", lambda name: EVAL if name == first else TRAIN)
        return folder, stores

    def make(
        self, place: TextSource, tokenizer: Tokenizer, split: object, route: Route
    ) -> tuple[Path, list[str]]:
        """Make or find the folder of this place, tokenizer and split in the cache.

        One process: ranks wait for it, and fast tokenizers have threads of their own.
        """
        recipe = {"files": place.key(), "tokenizer": tokenizer.fingerprint, "split": split}
        folder = self.folder_for("tokens", *recipe.values())
        progress = TokeniseProgress(place.path, place.num_bytes())
        index = build_folder(
            folder,
            recipe,
            lambda writer: tokens_of(place, tokenizer, route, writer),
            tokenizer,
            progress,
        )
        return folder, list(index.stores)

    def check_virtual(self, ids: Sequence[int]) -> None:
        refuse_virtual(ids)

    def build(
        self,
        *,
        tokenizer: Tokenizer,
        seed: int,
        rank: int,
        num_ranks: int,
        virtual_ids: Sequence[int] = (),
    ) -> tuple[StepLoader, EvalLoader | None]:
        """Return the loaders of one data-parallel rank."""
        refuse_virtual(virtual_ids)
        train, evaluation = self.stores(tokenizer)
        return loaders(
            PackedRows(train, self.row_tokens),
            PackedRows(evaluation, self.row_tokens) if evaluation else None,
            self.named_sources, global_samples=self.global_rows,
            micro_rows=self.rows_per_micro_batch(num_ranks), seed=seed, rank=rank,
            num_ranks=num_ranks,
        )  # fmt: skip

    def build_eval(
        self, *, tokenizer: Tokenizer, virtual_ids: Sequence[int] = ()
    ) -> EvalLoader | None:
        refuse_virtual(virtual_ids)
        parts = self.eval_parts(tokenizer)
        rows = PackedRows(TokenStore(*parts), self.row_tokens) if parts else None
        return eval_loader(rows, self.rows_per_micro_batch(1))
