"""The newest checkpoint that is intact, and filling a model and an optimizer from its files."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint import commit
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.retention import set_aside
from trainer.checkpoint.tensor_file import (
    Entry,
    missing_and_unexpected,
    read_elements,
    read_entries,
)
from trainer.distributed import Ranks
from trainer.errors import StorageError
from trainer.pieces import Piece
from trainer.protocols import Engine

log = logging.getLogger(__name__)
EngineAt = Callable[[int], Engine]
STATE = "state"
REMEDY = "set model, optim and precision to those of the save"


def steps_for_all(parent: Path, ranks: Ranks) -> list[int]:
    """Return the committed steps, newest first. Collective.

    Rank 0 looks for all: a shared file system need not show every rank the same.
    """
    found = commit.committed_steps(parent) if ranks.placement.is_main else []
    steps: list[int] = json.loads(ranks.broadcast_text(json.dumps(found)))
    return steps


def restore(
    parent: Path,
    engine_at: EngineAt,
    steps: list[int],
    contents: Contents,
    ranks: Ranks,
    *,
    is_main: bool,
    strict: bool,
) -> dict[str, Any] | None:
    """Load the first of `steps` that verifies into its engine; return its state, or None.

    A damaged step is set aside with a loud line, on the way to the next older one; `strict`: it is
    left as it is. StorageError where no step is used, ValueError at one of a newer version.
    Collective.
    """
    for number, step in enumerate(steps, start=1):
        folder, older = commit.step_folder(parent, step), steps[number:]
        if _verifies(folder, ranks, is_main=is_main):
            return load(engine_at(step), folder, contents)
        if strict:
            raise StorageError(
                f"{folder} is damaged, and resume_strict=true uses no older step; bring its files "
                "back, or set resume_strict=false"
            )
        if is_main:
            aside = set_aside(folder, "bad")
            log.error(
                "step %d is damaged and was renamed to %s; next is %s",
                step, aside.name, f"step {older[0]}" if older else "none: it was the last one",
            )  # fmt: skip
        ranks.barrier()
    if steps:
        raise StorageError(
            f"none of the {len(steps)} checkpoints in {parent} is intact; all were renamed to "
            "step_N.bad-K: bring their files back and rename them, or start anew with resume=never"
        )
    return None


def _verifies(folder: Path, ranks: Ranks, *, is_main: bool) -> bool:
    placement, failure, is_read = ranks.placement, None, False
    try:
        body = commit.read_manifest(folder)
        is_read = True
        commit.verify(folder, body, placement.rank, placement.world_size)
    except (OSError, StorageError) as error:
        failure = error
        if is_main or is_read:  # one manifest for all: else each rank finds what is its own
            log.error("%s", error)
    (failed,) = ranks.maximum([1 if failure else 0])
    return not failed


def load(engine: Engine, folder: Path, contents: Contents) -> dict[str, Any]:
    """Fill weights and optimizer state from a verified checkpoint; return its state.json.

    ValueError where it was trained on another base, or holds other tensors than the run keeps.
    """
    contents.check_base(folder)
    fill(contents.of(engine.weights()), folder / contents.folder)
    fill(engine.optimizer_state(), folder / STATE)
    engine.loaded()
    state: dict[str, Any] = json.loads((folder / STATE / "state.json").read_text())
    return state


def fill(pieces: dict[str, Piece], folder: Path) -> None:
    """Copy each piece's range out of the safetensors of `folder`; names and dtypes must match.

    ValueError where they do not: the files are those that were saved, so the settings differ.
    """
    entries = read_entries(folder)
    if problems := list(missing_and_unexpected(entries, pieces)):
        raise ValueError(f"{folder}: {problems[0]} ({len(problems)} such tensors); {REMEDY}")
    for name, piece in pieces.items():
        entry = entries[name]
        if entry.dtype != piece.local.dtype:
            raise ValueError(
                f"{folder / entry.file}: {name} is {entry.dtype}, "
                f"the run keeps {piece.local.dtype}; {REMEDY}"
            )
        if entry.shape != piece.shape:
            raise ValueError(
                f"{folder / entry.file}: {name} has shape {list(entry.shape)}, "
                f"the run needs {list(piece.shape)}; {REMEDY}"
            )
        piece.local.copy_(piece.cut(partial(_read, folder, entry, name)))


def _read(folder: Path, entry: Entry, name: str, start: int, stop: int) -> Tensor:
    return read_elements(folder, entry, start, stop, name)
