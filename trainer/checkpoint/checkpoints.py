"""Saving and restoring a run: every rank writes and reads its own byte ranges."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint import commit
from trainer.checkpoint.background import Flight, Writer
from trainer.checkpoint.composition import Composition, sizes_of
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.failures import MAX_IN_A_ROW, Failures
from trainer.checkpoint.interval import Clock
from trainer.checkpoint.loading import EngineAt, restore
from trainer.checkpoint.lock import RunLock
from trainer.checkpoint.retention import collect_debris
from trainer.checkpoint.spec import CheckpointSpec
from trainer.checkpoint.staging import Group, Part, copy, parts_of, ranges_of
from trainer.checkpoint.writer import Commit, Job, Result, explain
from trainer.checkpoint.writing import refuse_link
from trainer.control import Word
from trainer.distributed import Ranks
from trainer.errors import StorageError
from trainer.files import fsync_file
from trainer.protocols import Engine, Saved

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05


class Checkpoints:
    """The checkpoints of one run. Every method is collective, if nothing else is said.

    One save is under way at a time. Each rank copies its part into memory and goes on; its writer
    process does the rest. Rank 0 knows when the step is committed, and any rank when its own part
    failed: the ranks learn both from each other's control word, so all conclude at the same step.
    """

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
        self.ranks, self.lock, self.contents = ranks, lock, contents
        self._composition = Composition(spec, contents, describe_model)
        self.listener: Callable[[Saved], None] = lambda _: None
        (self.generation,) = ranks.maximum([lock.generation if lock else 0])
        self.failures = Failures(spec.max_minutes_without)
        self._number = self._needed = 0
        self._flight: Flight | None = None
        self._clock = Clock(spec, ranks.placement.world_size)
        self._newest: int | None = None
        self._ended: Result | None = None
        """Of this rank's part of the save under way; None: it goes on."""
        self._writer = Writer([lock.descriptor] if lock else [])
        if lock:
            refuse_link(folder)
            collect_debris(folder)
        ranks.barrier()

    def save(
        self,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        *,
        is_last: bool,
        best_step: int | None = None,
        appended: tuple[Path, ...] = (),
    ) -> None:
        """Begin to save step `step`, after the save before has ended; `listener` hears of the end.

        The last save of a run is waited for, and tried again when it fails. Step `best_step` is
        kept however old it gets; `appended` files are made durable before the commit. Raises
        StorageError when too many saves in a row failed.
        """
        self.finish()
        while True:
            self._begin(step, engine, state, best_step, appended)
            if is_last or not self.spec.background:
                self.finish()
            if not is_last or self._newest == step:
                return

    def sign(self, word: Word, seconds: float = 0.0) -> Word:
        """Add to this rank's word how the save under way is doing here. Not collective."""
        flight = self._flight
        if flight is None:
            is_due = self.lock is not None and (self._clock.is_due or self.failures.is_late)
            return word._replace(save_wanted=self._number + 1 if is_due else 0)
        if self._ended is None and flight.writes:
            self._ended = self._writer.result(seconds)
        if self._ended is None:
            return word
        if self._ended.error:
            return word._replace(save_failed=flight.number)
        return word._replace(saved=flight.number if self.lock else 0)

    def are_due(self, word: Word) -> bool:
        """Whether the agreed word asks for a save that has not begun."""
        return word.save_wanted > self._number

    def heed(self, word: Word) -> None:
        """Conclude the save under way, if the agreed word says that it ended."""
        flight = self._flight
        if flight and word.save_failed == flight.number:
            self._fail(flight)
        elif flight and word.saved == flight.number:
            self._succeed(flight)

    def finish(self) -> None:
        """Wait until no save is under way."""
        while self._flight:
            own = self.sign(Word(), POLL_SECONDS)
            saved, save_failed = self.ranks.maximum([own.saved, own.save_failed])
            self.heed(own._replace(saved=saved, save_failed=save_failed))

    def close(self) -> None:
        """Give up what is under way, and the hold on the lock. Not collective."""
        self._writer.kill()

    def _begin(
        self,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        best_step: int | None,
        appended: tuple[Path, ...],
    ) -> None:
        """Copy this rank's part, and hand it to the writer; all ranks agree not to, if need be."""
        started = time.monotonic()
        groups = self._composition.groups(engine)
        files: dict[str, bytes] = {}
        is_there, refusal = False, ""
        if self.lock:
            is_there = (commit.step_folder(self.folder, step) / commit.MANIFEST).exists()
            files, refusal = self._composition.files_or_refusal(self.folder, groups, state)
        self._needed = sum(sizes_of(groups, files).values())
        parts = parts_of(groups if engine.writes else [], files)
        # Rank 0 looks for all: ranks that disagreed would issue different collectives.
        num_there, num_refused, num_writers = self.ranks.total(
            [int(is_there), int(bool(refusal)), int(bool(parts))]
        )
        self._number += 1
        self._clock.start()
        flight = Flight(self._number, step, 0.0, bool(parts))
        self._ended = Result(error=refusal) if refusal else None
        if num_there:
            self._succeed(flight)
        elif num_refused:
            self._fail(flight)
        else:
            lead = self._commit(groups, files, num_writers - 1, best_step) if self.lock else None
            self._hand_over(step, parts, lead, appended)
            self._flight = flight._replace(seconds_paused=time.monotonic() - started)

    def _commit(
        self, groups: list[Group], files: dict[str, bytes], num_others: int, best_step: int | None
    ) -> Commit:
        assert self.lock is not None
        return Commit(
            sizes=sizes_of(groups, files), facts=self.facts, num_others=num_others,
            run=str(self.lock.folder), generation=self.generation, keep=self.spec.keep,
            best_step=best_step,
        )  # fmt: skip

    def _hand_over(
        self, step: int, parts: list[Part], lead: Commit | None, appended: tuple[Path, ...]
    ) -> None:
        """Let the writer begin; without a part there is only something to make durable."""
        try:
            if not parts:
                for path in appended:
                    fsync_file(path)
                return
            num_bytes = parts[-1].stop
            copy(parts, self._writer.memory(num_bytes))
            self._writer.submit(
                Job(
                    parent=str(self.folder),
                    staging=f"step_{step:08d}.tmp-{self.generation}-{self._number}",
                    step=step, rank=self.ranks.placement.rank, num_bytes=num_bytes,
                    ranges=ranges_of(parts), appended=[str(path) for path in appended],
                    commit=lead,
                )
            )  # fmt: skip
        except (OSError, StorageError) as error:
            self._ended = Result(error=explain(error, self.folder))

    def _succeed(self, flight: Flight) -> None:
        self._flight, self._newest = None, flight.step
        self.failures.clear()
        ended = self._ended or Result()
        if self._ended:  # else nothing had to be written
            self._clock.took(paused=flight.seconds_paused, written=ended.seconds)
        if ended.warning:
            log.warning("old checkpoints were not tidied: %s", ended.warning)
        self._tell(flight, commit.step_folder(self.folder, flight.step), ended.seconds)

    def _fail(self, flight: Flight) -> None:
        """Give up the save on all ranks, and the run after too many of them, or too long."""
        self._writer.kill()
        own, rank = self._ended.error if self._ended else "", self.ranks.placement.rank
        failed, is_over = self.ranks.maximum([rank + 1 if own else 0, int(self.failures.is_late)])
        if self.lock:  # all writers are dead by now
            self._clear()
        elif own:
            log.error("rank %d could not save step %d: %s", rank, flight.step, own)
        self._flight = None
        self.failures.add()
        self._tell(flight, None, 0.0)
        reason = own or f"rank {failed - 1} could not write to {self.folder}; its log says why"
        number = self.failures.in_a_row
        if is_over or number >= MAX_IN_A_ROW:
            raise StorageError(self.failures.last_words(reason, self.folder, self._needed))
        if self.lock:
            log.error("checkpoint of step %d failed (%d in a row; the run ends after %d): %s",
                      flight.step, number, MAX_IN_A_ROW, reason)  # fmt: skip

    def _clear(self) -> None:
        try:
            collect_debris(self.folder)
        except OSError as error:
            log.warning("the failed save left files behind: %s", explain(error, self.folder))

    def _tell(self, flight: Flight, folder: Path | None, seconds: float) -> None:
        self.listener(
            Saved(
                step=flight.step, folder=folder, num_failures=self.failures.in_a_row,
                seconds_paused=flight.seconds_paused, seconds_written=seconds,
            )
        )  # fmt: skip

    def restore(
        self, engine_at: EngineAt, steps: list[int], *, strict: bool = False
    ) -> dict[str, Any] | None:
        """Load the first of `steps` that is intact; return its state or None: `loading.restore`."""
        return restore(
            self.folder, engine_at, steps, self.contents, self.ranks,
            is_main=self.lock is not None, strict=strict,
        )  # fmt: skip
