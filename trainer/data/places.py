"""Where documents come from, and which of them are held out: of all data that is made here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import xxhash

from trainer.data.batching import check_share
from trainer.data.bpe import trained_bpe
from trainer.data.named_sources import EVAL_KEY, Source, eval_source, key_of, named_sources
from trainer.data.sources import Readable
from trainer.data.tokenise import eval_rank
from trainer.data.tokenizers import BPE, Tokenizer, given_tokenizer
from trainer.data.tokens import EVAL, TRAIN, VERSION, Part
from trainer.errors import DataError

P = TypeVar("P", bound=Readable)
Route = Callable[[str], str]
"""Returns which store a document of an id belongs to."""


@dataclass(frozen=True, kw_only=True)
class Places(ABC, Generic[P]):
    """Settings of one place or several; a subclass says how one is opened and made into shards."""

    path: str | None = None
    """Folder or file with jsonl, csv, parquet, arrow, or text where texts are wanted;
    hf://datasets/OWNER/NAME[@REVISION], of the Hub; or `stdlib`, the running Python's sources."""
    subset: str | None = None
    """Subset (config) of a data set of the Hub; None: its default."""
    split: str | None = None
    """Split of a data set of the Hub; None: train."""
    sources: dict[str, Source] | None = None
    """Several such places by name, instead of `path`, `subset` and `split`."""
    max_documents: int | None = None
    """How many documents of each place are used, the first ones; None: all."""
    eval_path: str | None = None
    """Place to evaluate on, as `path`; None: `eval_fraction` of the documents of `path`."""
    eval_subset: str | None = None
    """Subset of `eval_path`, as `subset`."""
    eval_split: str | None = None
    """Split of `eval_path`, as `split`."""
    eval_fraction: float = 0.01
    """Share of documents held out by hash of id or content, when there is no eval_path."""
    cache: str = "~/.cache/tessera"
    """Folder for tokenised data, trained tokenizers and names of labels."""

    def __post_init__(self) -> None:
        check_share(self.eval_fraction)

    @abstractmethod
    def open_place(self, source: Source, key: str) -> P:
        """Return what stands at a source, whose path has this config key."""

    @abstractmethod
    def make(
        self, place: P, tokenizer: Tokenizer, split: object, route: Route
    ) -> tuple[Path, list[str]]:
        """Make the shards of a place, or find them in the cache; return their folder and stores."""

    @cached_property
    def named_sources(self) -> dict[str, Source]:
        return named_sources(self.path, self.sources, subset=self.subset, split=self.split)

    @cached_property
    def places(self) -> dict[str, P]:
        """Where training documents come from."""
        return {
            name: self.open_place(source, key_of(name))
            for name, source in self.named_sources.items()
        }

    @cached_property
    def eval_place(self) -> P | None:
        source = eval_source(self.eval_path, subset=self.eval_subset, split=self.eval_split)
        return None if source is None else self.open_place(source, EVAL_KEY)

    @property
    def all_places(self) -> list[P]:
        evaluation = self.eval_place
        return [*self.places.values(), *([evaluation] if evaluation else [])]

    def holds_out(self) -> bool:
        return bool(self.eval_path or self.eval_fraction)

    @property
    def held_out_share(self) -> float:
        """Share of each place's documents that is held out: with an eval_path none."""
        return 0.0 if self.eval_path else self.eval_fraction

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache).expanduser()

    def folder_for(self, kind: str, *parts: object) -> Path:
        """Return the folder of the cache for what `parts` decide, all of them together."""
        key = xxhash.xxh3_128_hexdigest("/".join(map(str, (VERSION, *parts))).encode())
        return self.cache_folder / kind / key

    def tokenizer(self, setting: str, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of a `tokenizer=` setting: byte, bpe (of vocab_size) or folder."""
        if setting != BPE:
            return given_tokenizer(setting)
        keys = [place.key() for place in self.places.values()]
        folder = self.folder_for("bpe", *keys, *self.text_settings, vocab_size)
        return trained_bpe(self.texts(), vocab_size, folder)

    @property
    def text_settings(self) -> tuple[str, ...]:
        """What decides `texts`, beside the places."""
        return ()

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Yield what a bpe is trained on: all texts of the places."""

    def make_split(self, place: P, tokenizer: Tokenizer) -> tuple[Path, list[str]]:
        """Make the documents of a place, those held out in a store of their own."""
        fraction = self.held_out_share
        return self.make(place, tokenizer, fraction, hold_out(fraction))

    def parts(self, tokenizer: Tokenizer) -> tuple[list[Part], list[Part]]:
        """Return the parts to train on and to evaluate on; DataError for a place without any."""
        training, held_out = [], []
        for name, place in self.places.items():
            folder, stores = self.make_split(place, tokenizer)
            if TRAIN not in stores:
                raise DataError(f"{place.name}={place.path} left no training document; add some")
            training.append(Part(folder, TRAIN, name))
            held_out += [Part(folder, EVAL, name)] if EVAL in stores else []
        return training, held_out if self.eval_path is None else self.eval_parts(tokenizer)

    def eval_parts(self, tokenizer: Tokenizer) -> list[Part]:
        """Return the parts to evaluate on alone: with an `eval_path`, nothing else is made."""
        place = self.eval_place
        if place is None:
            return self.parts(tokenizer)[1]
        folder, stores = self.make(place, tokenizer, EVAL, lambda _: EVAL)
        return [Part(folder, EVAL)] if EVAL in stores else []


def hold_out(fraction: float) -> Route:
    """Return which store a document of an id belongs to: this share is held out, by its hash."""
    return lambda document_id: EVAL if eval_rank(document_id) < fraction else TRAIN
