"""Filling a folder with shards: what is finished is kept, the rest is made, then the index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.shard_writer import NOTHING, ShardWriter
from trainer.data.shards import SUFFIX, Shard, Vocabulary
from trainer.data.tokens import INDEX, Entry, Index
from trainer.files import read_json, write_json

RECIPE = "recipe.json"


class FolderWriter:
    """Writes documents into `train-00000.shard`, `train-00001.shard`, .., `eval-00000.shard`, ..

    A shard ends with the document that fills it, so that its bytes depend on the documents alone.
    A folder that was left unfinished is gone on with: the documents of its finished shards are not
    wanted again.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, shard_tokens: int) -> None:
        self.folder, self.vocabulary, self.shard_tokens = folder, vocabulary, shard_tokens
        self.stores: dict[str, list[Entry]] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            self._stores_of(path.stem.rpartition("-")[0]).append(Entry.of(path, Shard(path).footer))
        self._kept = {
            name: sum(entry.num_documents for entry in entries)
            for name, entries in self.stores.items()
        }
        self.num_kept = sum(self._kept.values())
        self._writers: dict[str, ShardWriter] = {}

    def wants(self, name: str) -> bool:
        """Whether the next document of store `name` lies in no finished shard. Ask once for each.

        Documents must come in the same order as those that the finished shards were made of.
        """
        if not self._kept.get(name):
            return True
        self._kept[name] -= 1
        return False

    def add(
        self,
        name: str,
        tokens: np.ndarray,
        num_bytes: int,
        extra: Mapping[str, np.ndarray] = NOTHING,
    ) -> None:
        """Append a wanted document to store `name`."""
        writer = self._writers.get(name)
        if writer is None:
            number = len(self._stores_of(name))
            path = self.folder / f"{name}-{number:05d}{SUFFIX}"
            writer = self._writers[name] = ShardWriter(path, self.vocabulary)
        writer.add(tokens, num_bytes, extra)
        if writer.num_tokens >= self.shard_tokens:
            self._close(name)

    def finish(self) -> Index:
        """Close the last shards and write the index."""
        for name in list(self._writers):
            self._close(name)
        stores = {name: self.stores[name] for name in sorted(self.stores)}
        index = Index(vocabulary=self.vocabulary, stores=stores)
        index.write(self.folder)
        return index

    def abort(self) -> None:
        """Leave finished shards only. An interruption may have come while a file was opened."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        for path in self.folder.glob(f".*{SUFFIX}.tmp"):
            path.unlink()

    def _close(self, name: str) -> None:
        writer = self._writers[name]  # until it is closed, an interruption has to abort it
        self.stores[name].append(Entry.of(writer.path, writer.close()))
        del self._writers[name]

    def _stores_of(self, name: str) -> list[Entry]:
        return self.stores.setdefault(name, [])


def refuse_other(folder: Path, recipe: dict[str, Any]) -> None:
    """Raise ValueError if `folder` holds what was not made from `recipe`."""
    if (folder / RECIPE).exists():
        begun = read_json(folder / RECIPE)
        for key, value in recipe.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{folder} was begun with {key}={begun.get(key)}, not {value}; "
                    "go on as it was begun, or give output= a new folder"
                )
    elif folder.exists():
        found = sorted(entry.name for entry in folder.iterdir() if entry.name != "lock")
        if found:
            raise ValueError(f"{folder} holds {found[0]} and no tokens; give output= a new folder")


def claim(folder: Path, recipe: dict[str, Any]) -> None:
    """Write down what `folder` is made from; ValueError if it was begun with something else."""
    refuse_other(folder, recipe)
    if not (folder / RECIPE).exists():
        write_json(folder / RECIPE, recipe)


def is_complete(folder: Path) -> bool:
    """Whether all shards and the index are there."""
    return (folder / INDEX).exists()
