"""Saving and restoring a run: every rank writes and reads its own byte ranges."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit
from trainer.checkpoint.commit import FilePiece
from trainer.checkpoint.contents import AUTO, CHOICES, Contents
from trainer.checkpoint.loading import STATE, load
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.tensor_file import TensorFiles, own_ranges, plan, write_index
from trainer.distributed import Ranks
from trainer.errors import StorageError
from trainer.files import write_json, write_text
from trainer.pieces import Piece
from trainer.protocols import Engine

log = logging.getLogger(__name__)
EngineAt = Callable[[int], Engine]
MAX_FAILURES = 3  # saves that may fail in a row before the run stops


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """How checkpoints are kept."""

    keep: int = 2
    """Newest checkpoints that stay on disk."""
    max_file_gb: float = 5.0
    """Largest weight file, in 1e9 bytes; a larger model is split as Hugging Face splits it."""
    contents: str = AUTO
    """`model`, all weights; `trained`, those that train and the hash of all others; `auto`: trained
    with freeze=new_tokens, else model. An adapter is always saved alone."""

    def __post_init__(self) -> None:
        if self.contents not in CHOICES:
            raise ValueError(
                f"checkpoint.contents={self.contents}: set it to {' or '.join(CHOICES)}"
            )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} would keep none; set it to 1 or more")
        if self.max_file_gb <= 0:
            raise ValueError(f"checkpoint.max_file_gb={self.max_file_gb}: set it above 0")


class Checkpoints:
    """The checkpoints of one run. Every method is collective: every rank must call it."""

    def __init__(
        self,
        spec: CheckpointSpec,
        folder: Path,
        *,
        ranks: Ranks,
        lock: RunLock | None,
        facts: dict[str, Any],
        describe_model: Callable[[Path], None],
        contents: Contents,
    ) -> None:
        """`lock` is rank 0's; `describe_model` writes config and tokenizer files into a folder."""
        self.spec, self.folder, self.facts = spec, folder, facts
        self.ranks, self.lock = ranks, lock
        self.describe_model, self.contents = describe_model, contents
        (self.generation,) = ranks.maximum([lock.generation if lock else 0])
        self.failures = 0
        if lock:
            commit.collect_debris(folder)
        ranks.barrier()

    def save(
        self,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        *,
        is_last: bool,
        best_step: int | None = None,
    ) -> Path | None:
        """Commit step `step`; return its folder, or None when that failed and may be retried later.

        Step `best_step` is kept however old it gets. Raises StorageError when the last save of a
        run, or MAX_FAILURES in a row, failed.
        """
        final = commit.step_folder(self.folder, step)
        # Rank 0 looks for all: ranks that disagreed would issue different collectives.
        is_there = self.lock is not None and (final / commit.MANIFEST).exists()
        try:
            if not self.ranks.maximum([int(is_there)])[0]:
                self._write(step, final, engine, state)
        except StorageError as error:
            self.failures += 1
            if is_last or self.failures >= MAX_FAILURES:
                raise
            log.error("checkpoint of step %d failed (%d in a row): %s", step, self.failures, error)
            return None
        self.failures = 0
        if self.lock:
            self._tidy(final, best_step)
        return final

    def _tidy(self, newest: Path, best_step: int | None) -> None:
        """Point `latest` to the newest step and `best` to the best one, and delete old ones.

        A failure here loses nothing.
        """
        try:
            commit.retain(self.folder, self.spec.keep, best_step)
            write_text(self.folder / "latest", newest.name + "\n")
            if best_step is not None:
                write_text(
                    self.folder / "best", commit.step_folder(self.folder, best_step).name + "\n"
                )
        except OSError as error:
            log.warning("old checkpoints were not tidied: %s", _explain(error, self.folder))

    def _write(self, step: int, final: Path, engine: Engine, state: dict[str, Any]) -> None:
        staging = self.folder / f"{final.name}.tmp-{self.generation}"
        contents, max_bytes = self.contents, int(self.spec.max_file_gb * 1e9)
        groups = {}
        for folder, stem, pieces in (
            (contents.folder, contents.stem, contents.of(engine.weights())),
            (STATE, "optimizer", engine.optimizer_state()),
        ):
            whole = {name: piece.with_whole_rows() for name, piece in pieces.items()}
            groups[folder] = whole, plan(pieces, stem, max_bytes)
        self._together(lambda: self._stage(step, groups, state), staging, main_only=True)
        self._together(lambda: self._write_own(staging, groups, engine.writes), staging)
        self._together(lambda: self._commit(step, staging, final), staging, main_only=True)

    def _together(
        self, work: Callable[[], None], staging: Path, *, main_only: bool = False
    ) -> None:
        """Run `work`; if it failed on any rank, clean up and raise StorageError on all of them."""
        failure: OSError | StorageError | None = None
        if self.lock or not main_only:
            try:
                work()
            except (OSError, StorageError) as error:
                failure = error
                log.error("rank %d: %s", self.ranks.placement.rank, _explain(error, self.folder))
        (failed_rank,) = self.ranks.maximum([self.ranks.placement.rank + 1 if failure else 0])
        if failed_rank:
            if self.lock:
                shutil.rmtree(staging, ignore_errors=True)
            raise StorageError(
                _explain(failure, self.folder)
                if failure
                else f"rank {failed_rank - 1} could not write to {self.folder}; its log says why"
            )

    def _stage(
        self,
        step: int,
        groups: dict[str, tuple[dict[str, Piece], TensorFiles]],
        state: dict[str, Any],
    ) -> None:
        """Rank 0: make the folder, the small files, and full-size tensor files with headers."""
        needed = sum(sum(files.sizes.values()) for _, files in groups.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < 1.2 * needed:
            raise StorageError(
                f"{self.folder} has {free / 1e9:.3f} GB free, a checkpoint needs "
                f"{1.2 * needed / 1e9:.3f} GB; free space or lower checkpoint.keep"
            )
        staging = commit.stage(self.folder, step, self.generation)
        pieces: list[FilePiece] = []
        for name, (_, files) in groups.items():
            (staging / name).mkdir()
            for file, header in files.headers.items():
                path = staging / name / file
                ranges = [(0, memoryview(header))]
                pieces += commit.write_pieces(path, f"{name}/{file}", ranges)
                os.truncate(path, files.sizes[file])
        write_json(staging / STATE / "state.json", state)
        model = self.contents.folder
        self.describe_model(staging / model)
        write_index(staging / model, groups[model][1])
        pieces += commit.hash_small_files(staging)
        commit.publish_pieces(staging, "headers", pieces)

    def _write_own(
        self,
        staging: Path,
        groups: dict[str, tuple[dict[str, Piece], TensorFiles]],
        writes: bool,
    ) -> None:
        """Write the ranges that this rank answers for, if its copy of the model `writes`."""
        written: list[FilePiece] = []
        for folder, (pieces, files) in groups.items():
            for file in files.headers if writes else ():
                ranges = chain.from_iterable(
                    own_ranges(piece, files.entries[name])
                    for name, piece in pieces.items()
                    if files.entries[name].file == file
                )
                name = f"{folder}/{file}"
                written += commit.write_pieces(staging / name, name, ranges)
        commit.publish_pieces(staging, f"rank{self.ranks.placement.rank:05d}", written)

    def _commit(self, step: int, staging: Path, final: Path) -> None:
        assert self.lock is not None
        pieces = commit.collected_pieces(staging)
        facts = {"step": step, "generation": self.generation, **self.facts}
        commit.commit(staging, final, facts, pieces, self.lock.check)

    def restore(self, engine_at: EngineAt, steps: list[int]) -> dict[str, Any] | None:
        """Load the first of `steps` that verifies into its engine; return its state, or None.

        A damaged step is set aside with a loud line, on the way to the next older one.
        """
        for step in steps:
            folder = commit.step_folder(self.folder, step)
            if self._verifies(folder):
                return load(engine_at(step), folder, self.contents)
            if self.lock:
                aside = commit.set_aside(folder, "bad")
                log.error("step %d is damaged and was renamed to %s", step, aside.name)
            self.ranks.barrier()
        if steps:
            raise StorageError(
                f"none of the {len(steps)} checkpoints in {self.folder} is intact; "
                "start anew with resume=never"
            )
        return None

    def _verifies(self, folder: Path) -> bool:
        placement = self.ranks.placement
        failure = None
        try:
            body = commit.read_manifest(folder)
            commit.verify(folder, body, placement.rank, placement.world_size)
        except (OSError, StorageError) as error:
            failure = error
            log.error("%s", error)
        (failed,) = self.ranks.maximum([1 if failure else 0])
        return not failed


def _explain(error: OSError | StorageError, folder: Path) -> str:
    if isinstance(error, StorageError):
        return str(error)
    free = shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0
    return f"{error.filename or folder}: {error.strerror} ({free:.3f} GB free)"
