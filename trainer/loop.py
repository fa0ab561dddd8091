"""The loop: train, log, evaluate, save, in this order. It knows protocols only."""

import logging
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from trainer.best import Best
from trainer.callbacks.protocol import Callback
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.loading import steps_for_all
from trainer.control import ControlWord, HostResult, Readback
from trainer.data.loader import Step, StepLoader
from trainer.data.prefetch import Ahead
from trainer.evaluations import Evaluations
from trainer.meter import Meter
from trainer.numerics.guard import Guard
from trainer.numerics.watch import Watch
from trainer.plan import Plan
from trainer.progress import Progress
from trainer.protocols import Engine, Saved
from trainer.record import RunRecord
from trainer.replicas import Replicas
from trainer.stopping import Stopping
from trainer.whereabouts import Whereabouts

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Loop:
    """Everything that one `fit` works on."""

    engine: Engine
    loader: StepLoader
    progress: Progress
    plan: Plan
    evaluations: Evaluations
    best: Best
    checkpoints: Checkpoints
    control: ControlWord
    stopping: Stopping
    record: RunRecord
    meter: Meter
    callbacks: list[Callback]
    whereabouts: Whereabouts
    bits: dict[str, Any]
    """What decides the run's bits beside its config."""
    replicas: Replicas
    guard: Guard
    watch: Watch
    readback: Readback = field(default_factory=Readback)

    def __post_init__(self) -> None:
        self.checkpoints.listener = self._hear_of_save

    def fit(self) -> bool:
        """Train to plan.max_steps or until no evaluation gets better; return False when it ended
        early, after a save.

        Raises RewindError where it has to go on from an older step. Collective: every rank must
        call this.
        """
        self.progress.stopwatch.start()
        if self.progress.evaluation_due:
            self.evaluations.evaluate(self.engine, self.record)
        with closing(self.loader.steps(self.progress.step)) as steps:
            self._train(steps)
        if self.progress.step:
            self._save(is_last=True)
        self.control.drain()
        return not self.stopping.is_agreed or (self._has_all and not self.progress.evaluation_due)

    def _train(self, steps: Ahead[Step]) -> None:
        progress, plan, readback = self.progress, self.plan, self.readback
        while not self._is_over:
            number = progress.step + 1
            self.whereabouts.enter("data", number, self.loader.ranges(progress.step))
            with progress.stopwatch.waiting_for_data():
                step = self.stopping.next(steps)
            if step is None:
                break
            self.record.consumes(number, step.ranges, step.passed_over)
            self.whereabouts.enter("train_step", number, step.ranges, step.provenance)
            result = self.engine.train_step(number, step.micro_batches, step.num_tokens)
            progress.advance(result)
            self.replicas.check(progress.step, self.engine)
            self._note(readback.push(number, result))
            self.whereabouts.enter("control")
            agreed = self.control.exchange(self.checkpoints.sign(self.stopping.word(steps)))
            self.stopping.hear(agreed)
            self.checkpoints.heed(agreed)
            if plan.logs(progress.step):
                self._log()
            is_best = plan.evaluates(progress.step) and self.evaluations.evaluate(
                self.engine, self.record
            )
            is_due = plan.saves(progress.step) or is_best or self.checkpoints.are_due(agreed)
            if is_due and not self._is_over:
                self._note(readback.flush())
                self._save(is_last=False)
        self._note(readback.flush())

    @property
    def _has_all(self) -> bool:
        return self.progress.step >= self.plan.max_steps or self.best.is_over

    @property
    def _is_over(self) -> bool:
        return self.stopping.is_agreed or self._has_all

    def _log(self) -> None:
        self.whereabouts.enter("log")
        metrics = self.progress.close_window()
        metrics |= self.meter.measure(metrics)
        self.record.metrics(self.progress.step, "train", metrics)
        for callback in self.callbacks:
            callback.on_step(self.progress, metrics)

    def _save(self, *, is_last: bool) -> None:
        self.whereabouts.enter("save")
        if self.stopping.is_too_late:
            log.error(
                "step %d is not saved: a save takes longer than is left before the limit of time",
                self.progress.step,
            )
            self.checkpoints.finish()  # the one under way may still come in time
            return
        with self.progress.stopwatch.paused():
            self.checkpoints.finish()  # before the state: a save that fails may change the best
            state = {
                "progress": self.progress.state(),
                "data": self.loader.state(self.progress.step),
                "skipped_in_a_row": self.watch.skipped_in_a_row,
                "spike": self.guard.state(),
                "best": self.best.state(),
                "bits": self.bits,
            }
            self.checkpoints.save(
                self.progress.step, self.engine, state, is_last=is_last, best_step=self.best.step,
                appended=self.record.files,
            )  # fmt: skip

    def _hear_of_save(self, saved: Saved) -> None:
        """A save ended: this one, or one that went on in the background. Collective."""
        if saved.folder is None:
            failed = {"ckpt_failed": 1, "in_a_row": saved.num_failures}
            self.record.metrics(saved.step, "checkpoint", failed)
            if saved.step == self.best.step:  # its evaluation has no weights: the one before stays
                self.best.survive(steps_for_all(self.checkpoints.folder, self.checkpoints.ranks))
            return
        self.stopping.limit.took(save=saved.seconds_paused + saved.seconds_written)
        for callback in self.callbacks:
            callback.on_save(self.progress, saved)

    def _note(self, result: HostResult | None) -> None:
        """Write the ledger line of a finished step, and see what follows from its numbers.

        They are equal on every rank, so all ranks stop, or go back, at the same step.
        """
        if result is None:
            return
        self.record.result(result)
        self.watch.note(result, self.loader)
