"""The evaluations of a run: losses, answers, and whether the model was ever better."""

from dataclasses import dataclass
from typing import Any

from trainer.best import Best
from trainer.callbacks.protocol import Callback
from trainer.evaluate import Evaluator
from trainer.plan import Plan
from trainer.progress import Progress
from trainer.protocols import Engine
from trainer.record import RunRecord
from trainer.stopping import EvaluationStoppedError, Stopping
from trainer.validation.validator import Validator
from trainer.whereabouts import Whereabouts


@dataclass(kw_only=True)
class Evaluations:
    """What judges the model, and what is told of it."""

    evaluator: Evaluator | None
    """None: nothing is held out."""
    validator: Validator | None
    """None: nobody asks for answers."""
    plan: Plan
    progress: Progress
    best: Best
    stopping: Stopping
    whereabouts: Whereabouts
    callbacks: list[Callback]

    def evaluate(self, engine: Engine, record: RunRecord) -> bool:
        """Return whether this evaluation is the best so far; one that a stop cuts off stays due.

        Collective.
        """
        if self.evaluator is None:
            return False
        best = self.best.state()
        self.whereabouts.enter("evaluate")
        with self.progress.stopwatch.paused():
            try:
                metrics, is_best = self._judged(self.evaluator, engine)
            except EvaluationStoppedError:
                self.best.load(best)
                self.progress.evaluation_due = True
                record.owes_evaluation(self.progress.step)
                return False
            self.progress.evaluation_due = False
            record.metrics(self.progress.step, "eval", metrics)
            record.owes_evaluation(None)
            for callback in self.callbacks:
                callback.on_eval(self.progress, metrics)
        return is_best

    def _judged(self, evaluator: Evaluator, engine: Engine) -> tuple[dict[str, Any], bool]:
        """Return the numbers of an evaluation, and whether it is the best so far.

        Raises EvaluationStoppedError, before the first batch too.
        """
        if self.stopping.is_agreed:
            raise EvaluationStoppedError
        metrics: dict[str, Any] = evaluator.evaluate(engine, self.stopping.poll)
        is_due = self.plan.validates(self.progress.step)
        if is_due:
            metrics |= self._answers(engine)
        is_best = self.best.judge(self.progress.step, metrics)
        if self.best.is_over and not is_due:  # the last evaluation has answers
            metrics |= self._answers(engine)
        return metrics, is_best

    def _answers(self, engine: Engine) -> dict[str, float]:
        if self.validator is None:
            return {}
        self.whereabouts.enter("validate")
        title = f"step {self.progress.step}"
        return self.validator.validate(engine, title, self.stopping.poll)
