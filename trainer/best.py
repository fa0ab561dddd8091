"""The best evaluation of a run by one number: kept on disk, and the end when none is better."""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from trainer.near_names import did_you_mean

log = logging.getLogger(__name__)
MAX_RECENT = 16
_LOWER = ("loss", "perplexity", "bits_per_byte", "error")  # part of the names of such numbers


@dataclass(frozen=True, kw_only=True)
class BestSpec:
    """What "better" means."""

    metric: str | None = None
    """A number of the evaluation, as in metrics.jsonl; null: none is kept for it."""
    goal: Literal["auto", "min", "max"] = "auto"
    """`auto`: min for losses, errors and perplexities, max for everything else."""
    min_delta: float = 0.0
    """By how much a number must be better to count."""
    patience: int | None = None
    """Evaluations without a better one after which the run ends; null: it goes on."""

    def __post_init__(self) -> None:
        is_idle = self.patience is None and not self.min_delta and self.goal == "auto"
        if self.metric is None and not is_idle:
            raise ValueError(
                "goal, patience and min_delta have no effect without a metric; set metric"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience} is below 1; set it to 1 or more")
        if self.min_delta < 0:
            raise ValueError(f"min_delta={self.min_delta} is negative; set it to 0 or more")

    def check(self, known: tuple[str, ...], eval_every: int | None) -> None:
        """Raise ValueError for a metric that no evaluation of the run has."""
        if self.metric is None:
            return
        if eval_every is None:
            raise ValueError(f"best.metric={self.metric} needs evaluations; set eval_every")
        if self.metric not in known:
            hint = did_you_mean(self.metric, known)
            raise ValueError(
                f"best.metric={self.metric!r} is no number of this task's evaluations; {hint}"
                f"Set it to one of {', '.join(known)}"
            )

    @property
    def lower_is_better(self) -> bool:
        if self.goal == "auto":
            return any(part in str(self.metric) for part in _LOWER)
        return self.goal == "min"


class Best:
    """The best evaluation so far. Every rank has the same numbers, so all come to the same."""

    def __init__(self, spec: BestSpec, sample: str = "nothing") -> None:
        """`sample` says what evaluations read, in words that fit nothing else."""
        self.spec, self.sample = spec, sample
        self.step: int | None = None
        self.value = math.nan
        self.num_worse = 0
        self.recent: dict[int, float] = {}
        """The newest numbers by their step: one of them is the best when its checkpoint is lost."""

    def judge(self, step: int, metrics: dict[str, Any]) -> bool:
        """Take an evaluation in; return whether it is the best so far. NaN never is.

        One that has not the number, as those without answers, is no better and no worse.
        """
        if self.spec.metric is None or self.spec.metric not in metrics:
            return False
        value = float(metrics[self.spec.metric])
        if not math.isnan(value):
            self.recent = dict([*self.recent.items(), (step, value)][-MAX_RECENT:])
        gain = self.value - value if self.spec.lower_is_better else value - self.value
        is_better = gain > self.spec.min_delta or (self.step is None and not math.isnan(value))
        if is_better:
            self.step, self.value, self.num_worse = step, value, 0
        else:
            self.num_worse += 1
        return is_better

    def survive(self, committed: Collection[int]) -> None:
        """Where the best step has no checkpoint any more, take the best of those that have one.

        Else the run would hold on to numbers that no weights on disk belong to.
        """
        if self.step is None or self.step in committed:
            return
        self.recent = {step: value for step, value in self.recent.items() if step in committed}
        choose = min if self.spec.lower_is_better else max
        self.step = choose(self.recent, key=self.recent.__getitem__, default=None)
        self.value = math.nan if self.step is None else self.recent[self.step]

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.spec.patience is not None and self.num_worse >= self.spec.patience

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.spec.metric, "sample": self.sample,
            "step": self.step, "num_worse": self.num_worse,
            "value": None if math.isnan(self.value) else self.value,
            "recent": list(self.recent.items()),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; numbers of another metric or sample say nothing about ours.

        Those of an older checkpoint, which does not say what was read, neither.
        """
        if (state["metric"], state.get("sample")) == (self.spec.metric, self.sample):
            self.step, self.num_worse = state["step"], state["num_worse"]
            self.value = math.nan if state["value"] is None else state["value"]
            self.recent = dict(state.get("recent", ()))  # version 0.1 had none
        elif state["step"] is not None and self.spec.metric is not None:
            log.info(
                "best and patience begin anew: step %d was best by %s on %s, now it is %s on %s",
                state["step"], state["metric"], state.get("sample", "rows that it does not say"),
                self.spec.metric, self.sample,
            )  # fmt: skip
