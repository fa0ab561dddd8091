"""Which files a checkpoint consists of, and whether they fit on the disk."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint.contents import Contents
from trainer.checkpoint.loading import STATE
from trainer.checkpoint.spec import CheckpointSpec
from trainer.checkpoint.staging import Group
from trainer.checkpoint.tensor_file import index_of
from trainer.checkpoint.writer import explain
from trainer.errors import StorageError
from trainer.files import json_text
from trainer.protocols import Engine
from trainer.sizes import on_disk

SPARE = 1.2  # free space that a save must find, in sizes of a checkpoint
SPARE_FILES = 16


class Composition:
    """The tensors of an engine, in groups of a folder each, and the small files beside them."""

    def __init__(
        self, spec: CheckpointSpec, contents: Contents, describe_model: Callable[[Path], None]
    ) -> None:
        self.contents, self.describe_model = contents, describe_model
        self.max_bytes = int(spec.max_file_gb * 1e9)
        self._described: dict[str, bytes] | None = None

    def groups(self, engine: Engine) -> list[Group]:
        """Return the pieces of weights and of optimizer state. Collective."""
        contents = self.contents
        weights = contents.of(engine.weights())
        return [
            Group.of(contents.folder, contents.stem, weights, self.max_bytes),
            Group.of(STATE, "optimizer", engine.optimizer_state(), self.max_bytes),
        ]

    def files_or_refusal(
        self, folder: Path, groups: list[Group], state: dict[str, Any]
    ) -> tuple[dict[str, bytes], str]:
        """Return `files` for a checkpoint in `folder`, or why there is no room for them."""
        try:
            files = self.files(groups, state)
            check_space(folder, sizes_of(groups, files))
        except (OSError, StorageError) as error:
            return {}, explain(error, folder)
        return files, ""

    def files(self, groups: list[Group], state: dict[str, Any]) -> dict[str, bytes]:
        """Return the headers of the tensor files and all of the small files, on rank 0."""
        model = groups[0]
        beside = self._beside_weights() | index_of(model.files)
        return {
            **{f"{model.folder}/{name}": text for name, text in beside.items()},
            f"{STATE}/state.json": json_text(state).encode(),
            **{name: text for group in groups for name, text in group.headers.items()},
        }

    def _beside_weights(self) -> dict[str, bytes]:
        """Return config and tokenizer: the same in each checkpoint of a run."""
        if self._described is None:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                self.describe_model(folder)
                self._described = {
                    str(path.relative_to(folder)): path.read_bytes()
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                }
        return self._described


def sizes_of(groups: list[Group], files: dict[str, bytes]) -> dict[str, int]:
    """Return the bytes of every file of a checkpoint."""
    sizes = {name: len(text) for name, text in files.items()}
    return sizes | {name: num for group in groups for name, num in group.sizes.items()}


def check_space(folder: Path, sizes: dict[str, int]) -> None:
    """Raise StorageError where files of these sizes do not fit: before anything is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    found, needed = os.statvfs(folder), SPARE * sum(sizes.values())
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise StorageError(
            f"{folder} has {on_disk(free)} free, a checkpoint needs {on_disk(needed)}; free space "
            "or lower checkpoint.keep"
        )
    # Some file systems have no such limit and say 0.
    if found.f_files and found.f_favail < len(sizes) + SPARE_FILES:
        raise StorageError(
            f"{folder} has room for {found.f_favail} more files, a checkpoint needs "
            f"{len(sizes) + SPARE_FILES}; delete files on that disk or lower checkpoint.keep"
        )
