"""The weights of a Hugging Face folder, matched by name to a planned model before any is read."""

import json
import logging
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.lora import adapter_names
from models.nn.decoupled import new_rows
from trainer.checkpoint.contents import BASE
from trainer.checkpoint.tensor_file import Entry, read_elements, read_entries, read_header
from trainer.errors import StorageError
from trainer.files import read_json, read_keys
from trainer.parallel.materialise import Values, random_values
from trainer.parallel.pieces import named_pieces, tied_names, unique_parameters
from trainer.pieces import Piece

log = logging.getLogger(__name__)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".distcp")  # to read one is to run it
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where every parameter of a model comes from."""

    folder: Path
    entries: dict[str, Entry]
    """By parameter name of the model."""
    fresh: tuple[str, ...]
    """Parameters of a new head, which no file of another head has, of adapters and new rows."""
    base_hash: str | None = None
    """What a checkpoint that holds its trained weights alone says of all others."""
    own: frozenset[str] = frozenset()
    """Names of the weights that such a checkpoint holds."""
    is_seeded: bool = False
    """Whether all others come from a seed, as in the run that left that checkpoint."""
    new_head: tuple[str, ...] = ()
    """Those of `fresh` that belong to a head."""
    assembled: dict[str, Path | None] | None = None
    """Folders of the parts of an assembled model, by the names of its settings."""

    def values(self, model: nn.Module, std: float, seed: int) -> Values:
        """Return what fills each piece: the file's numbers, or random ones for what is new."""
        random = random_values(model, std, seed)
        if self.new_head:
            names = ", ".join(self.new_head)
            log.info(
                "%s has no head for this task: %s starts from random values", self.folder, names
            )

        def value(name: str, start: int, stop: int) -> Tensor:
            if name in self.fresh:
                return random(name, start, stop)
            return read_elements(self.folder, self.entries[name], start, stop, name)

        return value


def weight_entries(folder: Path) -> dict[str, Entry]:
    """Return every tensor of the folder's weight files; ValueError or StorageError in one line.

    As in Hugging Face: model.safetensors, else all shards that the index names, else (a folder
    without either) every safetensors file.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    entries = read_entries(folder) if folder.is_dir() else {}
    if not entries:
        files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
        pickled = [file for file in files if file.suffix in PICKLES or file.name == ".metadata"]
        found = f"only {pickled[0].name}, which is a pickle" if pickled else "no safetensors file"
        raise ValueError(
            f"weights={folder} holds {found}; convert it to safetensors, give a folder that has "
            "them, or set weights=random"
        )
    return entries


def _sharded(folder: Path) -> dict[str, Entry]:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        names = {Path(file).name for file in files}  # TypeError for what is no text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / INDEX} is no index of weights: {error!r}") from error
    entries: dict[str, Entry] = {}
    for file in files:
        if file not in names or not (folder / file).is_file():
            raise StorageError(
                f"{folder / INDEX} names {file}, which is not there; copy the missing shard"
            )
        found = read_header(folder / file)
        entries.update({n: e for n, e in found.items() if weight_map.get(n) == file})
    for name, file in weight_map.items():
        if name not in entries:
            raise StorageError(f"{folder / file} has no tensor {name}, which {INDEX} says it has")
    return entries


def match_weights(
    folder: Path,
    model: nn.Module,
    *,
    trunk_name: str,
    head_name: str,
    ignored: tuple[str, ...] = (),
) -> WeightSource:
    """Match the files of `folder` to a planned model by name and shape.

    Accepts what Hugging Face writes: tied aliases in the file or not, the trunk alone without its
    prefix, old buffers (`ignored` patterns), another head than the model's (that one is dropped and
    the model's own starts fresh). Raises ValueError for a tensor that is missing, unknown, of
    another shape, or an alias that differs from what it is tied to.

    Rows of new tokens may be in the file behind the others, apart, or not at all: then they start
    anew. A checkpoint that holds only what trained brings its base.
    """
    if (folder / BASE).is_file():
        return _on_base(folder, model, trunk_name=trunk_name, head_name=head_name, ignored=ignored)
    entries = {
        name: entry
        for name, entry in weight_entries(folder).items()
        if not any(fnmatchcase(name, pattern) for pattern in ignored)
    }
    if not any(name.startswith(f"{trunk_name}.") for name in entries):
        entries = {f"{trunk_name}.{name}": entry for name, entry in entries.items()}
    _drop_aliases(folder, entries, tied_names(model))
    wanted = named_pieces(unique_parameters(model))
    adapters = {name: wanted.pop(name) for name in adapter_names(model)}
    _split_rows(entries, wanted, new_rows(model))
    rows = tuple(name for name in new_rows(model) if name not in entries)
    has_head = any(name.startswith(f"{head_name}.") for name in entries)
    fresh = tuple(n for n in wanted if n.startswith(f"{head_name}.") and not has_head)
    if fresh and head_name == "lm_head":
        fresh = ()  # a language model without its head is broken, not new
    if fresh:
        entries = {n: e for n, e in entries.items() if n.startswith(f"{trunk_name}.")}
    check_entries(folder, entries, wanted, (*fresh, *rows))
    return WeightSource(
        folder=folder, entries=entries, fresh=(*fresh, *rows, *adapters), new_head=fresh
    )


def _split_rows(entries: dict[str, Entry], wanted: dict[str, Piece], new: dict[str, str]) -> None:
    """Take new rows from behind those in front of them, where the file has them in one matrix."""
    for name, front in new.items():
        whole, rows = entries.get(front), wanted[front].shape[0]
        shape = (rows + wanted[name].shape[0], wanted[name].width)
        if name not in entries and whole is not None and whole.shape == shape:
            cut = whole.offset(rows * shape[1])
            entries[front] = replace(whole, shape=wanted[front].shape, stop=cut)
            entries[name] = replace(whole, shape=wanted[name].shape, start=cut)


def stated_base(folder: Path) -> Path:
    """Return where the base of a checkpoint of what trained is; ValueError where it is not here."""
    named = read_keys(folder / BASE)["weights"]
    if not named or not Path(named).is_dir():
        raise ValueError(
            f"{folder / BASE}: weights={named!r} is no folder here; write there where the base is "
            "(one that started from random weights is in no folder)"
        )
    return Path(named)


def match_base(folder: Path, model: nn.Module) -> WeightSource | None:
    """Match the assembled base that a checkpoint of what trained names; None: it has another."""
    path = folder / BASE
    parts = read_keys(path).get("assembled") if path.is_file() else None
    if parts is None:
        return None
    from trainer.assembled import assembled_source  # it reads a text model through this file

    for name, part in parts.items():
        if part is not None and not Path(part).is_dir():
            raise ValueError(f"{path}: {name}={part!r} is no folder here; write there where it is")
    vision = parts["vision"]
    return assembled_source(Path(parts["text"]), Path(vision) if vision else None, model)


def _on_base(folder: Path, model: nn.Module, **names: Any) -> WeightSource:
    """Match a checkpoint that holds what trained to its base, and put the two together."""
    stated = read_json(folder / BASE)
    wanted = named_pieces(unique_parameters(model))
    own = {
        n: replace(e, file=str((folder / e.file).resolve()))
        for n, e in read_entries(folder).items()
    }
    check_entries(folder, own, {name: piece for name, piece in wanted.items() if name in own}, ())
    if stated["weights"] is None:
        others = tuple(name for name in wanted if name not in own)
        return WeightSource(
            folder=folder, entries=own, fresh=others, base_hash=stated["xxh3"],
            own=frozenset(own), is_seeded=True,
        )  # fmt: skip
    base = match_base(folder, model) or match_weights(stated_base(folder), model, **names)
    fresh = tuple(name for name in base.fresh if name not in own)
    return replace(
        base, entries=base.entries | own, fresh=fresh, base_hash=stated["xxh3"],
        own=frozenset(own), new_head=tuple(name for name in base.new_head if name in fresh),
    )  # fmt: skip


def _drop_aliases(folder: Path, entries: dict[str, Entry], ties: dict[str, str]) -> None:
    """Take further names of tied tensors out; ValueError where the file unties them."""
    for alias, name in ties.items():
        if alias not in entries:
            continue
        if name not in entries:  # stored under its other name
            entries[name] = entries.pop(alias)
            continue
        first, second = entries[name], entries.pop(alias)
        tensors = [_whole(folder, entry, name) for entry in (first, second)]
        if first.shape != second.shape or not torch.equal(*tensors):
            raise ValueError(
                f"weights={folder}: {alias} differs from {name}, to which the config ties it; "
                "set tie_word_embeddings to false"
            )


def _whole(folder: Path, entry: Entry, name: str) -> Tensor:
    return read_elements(folder, entry, 0, prod(entry.shape), name)


def check_entries(
    folder: Path, entries: dict[str, Entry], wanted: dict[str, Piece], fresh: tuple[str, ...]
) -> None:
    missing = [n for n in wanted if n not in entries and n not in fresh]
    unknown = [n for n in entries if n not in wanted]
    advice = "choose the model that these weights belong to"
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown to the model"
        raise ValueError(
            f"weights={folder}: {what} ({len(missing)} missing, {len(unknown)} unknown); {advice}"
        )
    for name, entry in entries.items():
        if entry.shape != wanted[name].shape:
            raise ValueError(
                f"weights={folder}: {name} has shape {list(entry.shape)}, the model needs "
                f"{list(wanted[name].shape)}; {advice}"
            )
