"""Filling a model and an optimizer from the safetensors files of a checkpoint."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.contents import Contents
from trainer.checkpoint.tensor_file import (
    Entry,
    missing_and_unexpected,
    read_elements,
    read_entries,
)
from trainer.errors import StorageError
from trainer.pieces import Piece
from trainer.protocols import Engine

STATE = "state"


def load(engine: Engine, folder: Path, contents: Contents) -> dict[str, Any]:
    """Fill weights and optimizer state from a verified checkpoint; return its state.json.

    ValueError where it was trained on another base.
    """
    contents.check_base(folder)
    fill(contents.of(engine.weights()), folder / contents.folder)
    fill(engine.optimizer_state(), folder / STATE)
    engine.loaded()
    state: dict[str, Any] = json.loads((folder / STATE / "state.json").read_text())
    return state


def fill(pieces: dict[str, Piece], folder: Path) -> None:
    """Copy each piece's range out of the safetensors of `folder`; names and dtypes must match."""
    entries = read_entries(folder)
    if problems := list(missing_and_unexpected(entries, pieces)):
        raise StorageError(f"{folder}: {problems[0]} ({len(problems)} such tensors)")
    for name, piece in pieces.items():
        entry = entries[name]
        if entry.dtype != piece.local.dtype:
            raise StorageError(
                f"{folder / entry.file}: {name} is {entry.dtype}, "
                f"the run keeps {piece.local.dtype}; set precision to the one it was saved with"
            )
        if entry.shape != piece.shape:
            raise StorageError(
                f"{folder / entry.file}: {name} has shape {list(entry.shape)}, "
                f"the model needs {list(piece.shape)}"
            )
        piece.local.copy_(piece.cut(partial(_read, folder, entry, name)))


def _read(folder: Path, entry: Entry, name: str, start: int, stop: int) -> Tensor:
    return read_elements(folder, entry, start, stop, name)
