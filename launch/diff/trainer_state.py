"""A Hugging Face Trainer's trainer_state.json beside a run of ours.

The Trainer logs the mean of the losses of the steps since its last log point, each step with the
same weight. From our ledger the same mean is formed, over the same steps. What it printed with few
digits is compared within half of the last one, and else within a float32.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from launch.diff.series import Drift, Loss, column, compare
from trainer.points import Points

FLOAT32 = 2.0**-23
MAX_SHOWN_DIGITS = 7  # after the point; with more it is no rounded number
_NAMES = {"grad_norm": "grad_norm", "learning_rate": "lr"}


@dataclass(frozen=True, kw_only=True)
class Logged:
    """One number of the log history."""

    value: float
    tolerance: float
    """Half of the last digit that was printed, or of a float32."""
    since: int = 0
    """Of a loss: the step of the log point before."""


def read_state(path: Path) -> dict[str, dict[int, Logged]]:
    """Return the numbers of a trainer_state.json by name and step; ValueError where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        state = json.loads(text, parse_float=Decimal)
        history = state["log_history"]
        found: dict[str, dict[int, Logged]] = {}
        before = 0
        for entry in history:
            step = int(entry["step"])
            for name in ("loss", "eval_loss", *_NAMES):
                if name in entry:
                    logged = _logged(entry[name], before)
                    found.setdefault(name, {})[step] = logged
            before = step if "loss" in entry else before
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give another b=") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path} is no trainer_state.json ({error!r}); give the file that a Trainer saved in a "
            "checkpoint, with its log_history"
        ) from None
    return found


def _logged(value: Any, since: int) -> Logged:
    number = float(value)
    digits = (
        -int(value.as_tuple().exponent) if isinstance(value, Decimal) and value.is_finite() else 0
    )
    half = 0.5 * 10.0**-digits if 0 < digits <= MAX_SHOWN_DIGITS else 0.0
    return Logged(value=number, tolerance=max(half, FLOAT32 * abs(number)), since=since)


def against_state(
    losses: dict[int, Loss], points: Points, state: dict[str, dict[int, Logged]]
) -> Iterator[Drift]:
    """Yield how the numbers of a run stand to the Trainer's."""
    logged = state.get("loss", {})
    means = {step: _mean(losses, one.since, step) for step, one in logged.items()}
    ours = {step: mean for step, mean in means.items() if mean is not None}
    yield _within("loss", ours, logged)
    for name, our_name in _NAMES.items():
        if name in state:
            yield _within(our_name, column(points.train, our_name), state[name])
    if "eval_loss" in state:
        yield _within("evaluation loss", column(points.evals, "loss"), state["eval_loss"])


def _mean(losses: dict[int, Loss], since: int, step: int) -> float | None:
    """Return the mean of the losses of the steps behind `since`; None where one is unknown."""
    if any(each not in losses for each in range(since + 1, step + 1)) or step <= since:
        return None
    return sum(losses[each].mean for each in range(since + 1, step + 1)) / (step - since)


def _within(name: str, ours: dict[int, float], theirs: dict[int, Logged]) -> Drift:
    widest = max((one.tolerance for one in theirs.values()), default=0.0)
    return compare(
        name,
        ours,
        {step: one.value for step, one in theirs.items()},
        is_same=lambda step: abs(ours[step] - theirs[step].value) <= theirs[step].tolerance,
        note=f"within what was printed, {widest:.1g} at most",
    )
