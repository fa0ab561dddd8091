"""Pretraining from shards that `tessera tokenize` made: nothing is tokenised, nothing is copied."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
from trainer.data.named_sources import Source, key_of, named_sources
from trainer.data.rows import PackedRows
from trainer.data.shards import Vocabulary
from trainer.data.tokenizers import BPE, Tokenizer, given_tokenizer
from trainer.data.tokens import EVAL, INDEX, TRAIN, Index, Part, TokenStore
from trainer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TokenFolder:
    """Rows of `row_tokens` tokens for causal language modelling."""

    path: str | None = None
    """Folder that `tessera tokenize` filled."""
    sources: dict[str, Source] | None = None
    """Several such folders by name, instead of `path`; all made with one tokenizer."""
    eval_path: str | None = None
    """Folder to evaluate on; None: what was held out of `path` when it was tokenised."""
    row_tokens: int
    """Length of a row, in tokens."""
    global_rows: int
    """Rows of one optimizer step over all ranks: the maths."""
    micro_rows: int | None = None
    """Rows of one forward pass of one rank: the execution. None: all rows of a rank at once."""

    def __post_init__(self) -> None:
        check_sizes(
            row_tokens=self.row_tokens, global_rows=self.global_rows, micro_rows=self.micro_rows
        )

    @cached_property
    def named_sources(self) -> dict[str, Source]:
        return named_sources(self.path, self.sources)

    @property
    def own_tokenizer(self) -> str:
        return next(iter(self.named_sources.values())).path

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

    def check(self) -> None:
        """Raise ValueError or DataError where shards are missing, cut, or of two tokenizers."""
        train, evaluation = self.stores()
        train.check()
        if evaluation is not None:
            evaluation.check()
        others = {key_of(name): source.path for name, source in self.named_sources.items()}
        if self.eval_path is not None:
            others["data.eval_path"] = self.eval_path
        first = next(iter(others))
        for key, path in others.items():
            if _opened(key, path).vocabulary.tokenizer != self._vocabulary.tokenizer:
                raise ValueError(
                    f"{key}={path} was made with another tokenizer than "
                    f"{first}={others[first]}; tokenise it with tokenizer={others[first]}"
                )

    def holds_out(self) -> bool:
        return self.stores()[1] is not None

    def tokenizer(self, setting: str, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of a `tokenizer=` setting; ValueError: the shards have another, and
        DataError where the one that lies beside them is."""
        if setting == BPE:
            raise ValueError(
                f"tokenizer=bpe is trained on text, and {self.own_tokenizer} holds tokens; "
                "set tokenizer=auto"
            )
        found = given_tokenizer(setting)
        if found.fingerprint != self._vocabulary.tokenizer:
            if setting == self.own_tokenizer:
                raise DataError(
                    f"{_folder(setting) / 'tokenizer.json'} (or a file beside it) is another one "
                    "than made the shards of its folder: it has fingerprint "
                    f"{found.fingerprint}, they say {self._vocabulary.tokenizer}; bring the old "
                    "one back, or tokenise the text again"
                )
            raise ValueError(
                f"tokenizer={setting} has fingerprint {found.fingerprint}, the shards of "
                f"{self.own_tokenizer} were made with {self._vocabulary.tokenizer}; "
                f"set tokenizer={self.own_tokenizer}, or tokenise the text again"
            )
        return found

    def check_encoding(self, tokenizer: Tokenizer | None) -> None:
        """Raise ValueError for another tokenizer than the documents were made with."""
        assert tokenizer is not None  # none is trained on shards
        if tokenizer.fingerprint != self._vocabulary.tokenizer:
            raise ValueError(
                f"model.additional_tokens: the shards of {self.own_tokenizer} were made without "
                "them; tokenise the text again with a tokenizer that has them"
            )

    @property
    def _vocabulary(self) -> Vocabulary:
        name, source = next(iter(self.named_sources.items()))
        return _opened(key_of(name), source.path).vocabulary

    def stores(self) -> tuple[TokenStore, TokenStore | None]:
        """Return the training tokens, and those to evaluate on; opens no shard."""
        parts, held_out = [], []
        for name, source in self.named_sources.items():
            source.refuse_hub_settings(key_of(name))
            index, folder = _opened(key_of(name), source.path), _folder(source.path)
            parts.append(Part(folder, TRAIN, name))
            held_out += [Part(folder, EVAL, name)] if EVAL in index.stores else []
        if self.eval_path is not None:
            index = _opened("data.eval_path", self.eval_path)
            # A folder of its own, all of which is to evaluate on, or one with a held-out part.
            kind = EVAL if EVAL in index.stores else TRAIN
            held_out = [Part(_folder(self.eval_path), kind)]
        return TokenStore(*parts), TokenStore(*held_out) if held_out else None

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
        train, evaluation = self.stores()
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
        evaluation = self.stores()[1]
        rows = PackedRows(evaluation, self.row_tokens) if evaluation else None
        return eval_loader(rows, self.rows_per_micro_batch(1))


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def _opened(key: str, path: str) -> Index:
    """Read the index of a folder; ValueError if it has none or no training tokens."""
    folder = _folder(path)
    if not folder.is_dir():
        raise ValueError(f"{key}={path} is no folder; give one that tessera tokenize made")
    if not (folder / INDEX).exists():
        is_begun = any(folder.glob("*.shard"))
        raise ValueError(
            f"{key}={path} is unfinished; start its tessera tokenize again"
            if is_begun
            else f"{key}={path} holds no shard; make some: tessera tokenize data.path=TEXT "
            "tokenizer=... output=DIR"
        )
    index = Index.read(folder)
    if TRAIN not in index.stores:
        raise ValueError(f"{key}={path} holds no training document; tokenise more text")
    return index
