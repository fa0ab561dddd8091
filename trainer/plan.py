"""When a run logs, evaluates, validates and saves."""

from dataclasses import dataclass


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
