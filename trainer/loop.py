"""The loop: train, log, evaluate, save, in this order. It knows protocols only."""

from dataclasses import dataclass, field
from typing import Any

from trainer.best import Best
from trainer.callbacks.protocol import Callback
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.control import ControlWord, HostResult, Readback, StopRequest, Word
from trainer.data.loader import StepLoader
from trainer.evaluate import Evaluator
from trainer.meter import Meter
from trainer.numerics.guard import Guard
from trainer.numerics.watch import Watch
from trainer.progress import Progress
from trainer.protocols import Engine
from trainer.record import RunRecord
from trainer.validation.validator import Validator
from trainer.whereabouts import Whereabouts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When what happens, in steps."""

    max_steps: int
    log_every: int
    eval_every: int | None
    validate_every: int | None
    """Evaluations, not steps."""
    save_every: int | None

    def logs(self, step: int) -> bool:
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def evaluates(self, step: int) -> bool:
        return self.eval_every is not None and (
            step % self.eval_every == 0 or step == self.max_steps
        )

    def validates(self, step: int) -> bool:
        """Whether the evaluation of this step asks for answers."""
        if self.eval_every is None or self.validate_every is None:
            return False
        return step % (self.eval_every * self.validate_every) == 0 or step == self.max_steps

    def saves(self, step: int) -> bool:
        is_due = self.save_every is not None and step % self.save_every == 0
        return is_due or step == self.max_steps


@dataclass(kw_only=True)
class Loop:
    """Everything that one `fit` works on."""

    engine: Engine
    loader: StepLoader
    progress: Progress
    plan: Plan
    evaluator: Evaluator | None
    validator: Validator | None
    checkpoints: Checkpoints
    control: ControlWord
    request: StopRequest
    record: RunRecord
    meter: Meter
    callbacks: list[Callback]
    whereabouts: Whereabouts
    best: Best
    guard: Guard
    watch: Watch
    readback: Readback = field(default_factory=Readback)

    def fit(self) -> bool:
        """Train to plan.max_steps or until no evaluation gets better; return False when a signal
        ended it early, after a save.

        Raises RewindError where it has to go on from an older step. Collective: every rank must
        call this.
        """
        progress, plan, readback = self.progress, self.plan, self.readback
        steps = self.loader.steps(progress.step)
        is_stopping = False
        progress.stopwatch.start()
        while progress.step < plan.max_steps and not is_stopping and not self.best.is_over:
            number = progress.step + 1
            self.whereabouts.enter("data", number, self.loader.ranges(progress.step))
            with progress.stopwatch.waiting_for_data():
                step = next(steps)
            self.record.consumes(number, step.ranges, step.passed_over)
            self.whereabouts.enter("train_step", number, step.ranges, step.provenance)
            result = self.engine.train_step(number, step.micro_batches, step.num_tokens)
            progress.advance(result)
            self._note(readback.push(number, result))
            self.whereabouts.enter("control")
            is_stopping = self.control.exchange(Word(stop=self.request.is_set)).stop
            if plan.logs(progress.step):
                self._log()
            is_best = False
            if plan.evaluates(progress.step) and self.evaluator:
                is_best = self._evaluate(self.evaluator)
            is_last = is_stopping or self.best.is_over or progress.step == plan.max_steps
            if plan.saves(progress.step) or is_best or is_last:
                self._note(readback.flush())
                self._save(is_last=is_last)
        self._note(readback.flush())
        self.control.drain()
        return progress.step >= plan.max_steps or self.best.is_over

    def _log(self) -> None:
        self.whereabouts.enter("log")
        metrics = self.progress.close_window()
        metrics |= self.meter.measure(metrics)
        self.record.metrics(self.progress.step, "train", metrics)
        for callback in self.callbacks:
            callback.on_step(self.progress, metrics)

    def _evaluate(self, evaluator: Evaluator) -> bool:
        """Return whether this evaluation is the best so far."""
        self.whereabouts.enter("evaluate")
        with self.progress.stopwatch.paused():
            metrics: dict[str, Any] = evaluator.evaluate(self.engine)
            is_due = self.plan.validates(self.progress.step)
            if is_due:
                metrics |= self._answers()
            is_best = self.best.judge(self.progress.step, metrics)
            if self.best.is_over and not is_due:  # the last evaluation has answers
                metrics |= self._answers()
            self.record.metrics(self.progress.step, "eval", metrics)
            for callback in self.callbacks:
                callback.on_eval(self.progress, metrics)
        return is_best

    def _answers(self) -> dict[str, float]:
        if self.validator is None:
            return {}
        self.whereabouts.enter("validate")
        return self.validator.validate(self.engine, f"step {self.progress.step}")

    def _save(self, *, is_last: bool) -> None:
        self.whereabouts.enter("save")
        with self.progress.stopwatch.paused():
            self.record.sync()
            state = {
                "progress": self.progress.state(),
                "data": self.loader.state(self.progress.step),
                "skipped_in_a_row": self.watch.skipped_in_a_row,
                "spike": self.guard.state(),
                "best": self.best.state(),
            }
            step = self.progress.step
            folder = self.checkpoints.save(
                step, self.engine, state, is_last=is_last, best_step=self.best.step
            )
            if folder is not None:
                for callback in self.callbacks:
                    callback.on_save(self.progress, folder)

    def _note(self, result: HostResult | None) -> None:
        """Write the ledger line of a finished step, and see what follows from its numbers.

        They are equal on every rank, so all ranks stop, or go back, at the same step.
        """
        if result is None:
            return
        self.record.result(result)
        self.watch.note(result, self.loader)
