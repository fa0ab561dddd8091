"""The card at the end of a run: how it ended, from where to where the loss went, how fast it was.

All is read off metrics.jsonl, which holds the starts before this one too. The page of the run says
it in the same words. Standard library only.
"""

import math
import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainer.best import BestSpec
from trainer.columns import Columns, exact
from trainer.points import LOSS, TIME, Points

MAX_NUMBERS = 4  # of an evaluation, beside the one that it is judged by


def card(
    points: Points, best: BestSpec, *, name: str, step: int, max_steps: int, seconds: float,
    first_step: int, finished: bool,
) -> dict[str, str]:  # fmt: skip
    """Return one line each on the end of a run, by a name; `seconds` are those since
    `first_step`."""
    verb = "finished" if finished else "stopped and saved"
    took = str(timedelta(seconds=round(seconds)))
    since = f" since step {first_step}" if first_step else ""
    lines = {
        "run": f"{name} {verb}: {step:,} of {max_steps:,} steps, {took}{since}",
        "loss": loss_in_words(points.train),
        "speed": speed_in_words(points),
        "eval": best_in_words(points.evals, best),
    }
    return {name: line for name, line in lines.items() if line}


def loss_in_words(train: Columns) -> str:
    """Return where the loss of training began and where it is; nothing of no point."""
    losses = train.column(LOSS)
    ends = range(len(losses))[:: max(1, len(losses) - 1)]  # one of one point
    return " -> ".join(f"{exact(losses[end])} at step {train.steps[end]:,}" for end in ends)


def speed_in_words(points: Points) -> str:
    """Return tokens per second, and how many in all; nothing where no point has any."""
    if points.speed is None:
        return ""
    tokens = points.train.last("tokens")
    seen = f", {tokens:,.0f} tokens in all" if tokens == tokens else ""
    return f"{points.speed:,.0f} tokens/s (median of log points){seen}"


def best_in_words(evals: Columns, spec: BestSpec) -> str:
    """Return the best evaluation with its other numbers, and the last; nothing of none."""
    if not evals.steps:
        return ""
    metric, row = best_of(evals, spec)
    values = evals.column(metric)
    others = [name for name in evals.names if not _is_aside(name) and name != metric]
    numbers = {name: evals.column(name)[row] for name in others[:MAX_NUMBERS]}
    said = [f"{name.replace('_', ' ')} {exact(v)}" for name, v in numbers.items() if v == v]
    best = f"best {metric.replace('_', ' ')} {exact(values[row])} at step {evals.steps[row]:,}"
    last = f", last {exact(values[-1])}" if evals.steps[row] != evals.steps[-1] else ""
    read = extent_in_words({name: evals.column(name)[row] for name in evals.names})
    on = f", on {read}" if read else ""
    return "; ".join([f"{best}{last}, of {len(values)}{on}", *([", ".join(said)] if said else [])])


def extent_in_words(found: Mapping[str, Any]) -> str:
    """Return how much of the held-out data the numbers of an evaluation speak of; nothing: all."""
    for unit in ("rows", "documents"):
        whole = found.get(f"num_{unit}_held_out", math.nan)
        if whole == whole:
            targets = f"{found['num_targets']:,.0f} targets"
            return f"{found[f'num_{unit}']:,.0f} of {whole:,.0f} held-out {unit} ({targets})"
    return ""


def _is_aside(name: str) -> bool:
    """Whether a number of an evaluation is a count, a time, or that of one source."""
    return name == TIME or name.startswith("num_") or "/" in name


def best_of(evals: Columns, spec: BestSpec) -> tuple[str, int]:
    """Return the number that evaluations are judged by, and the place of the best of them."""
    metric = spec.metric or LOSS
    sign = 1 if is_lower_better(spec) else -1
    ranks = [math.inf if math.isnan(v) else sign * v for v in evals.column(metric)]
    return metric, min(range(len(ranks)), key=ranks.__getitem__)


def is_lower_better(spec: BestSpec) -> bool:
    """Return which way evaluations are judged; by the loss where nothing else is said."""
    return spec.metric is None or spec.lower_is_better


def next_commands(folder: Path, asks: str) -> dict[str, str]:
    """Return what can be done with a run that has a checkpoint, and what each command gives.

    `asks`: as Run.asks.
    """
    run = shlex.quote(str(folder))
    return {
        **({f"tessera generate checkpoint={run} {asks}": "writes text"} if asks else {}),
        f"tessera evaluate checkpoint={run}": "loss and metrics; of a file: data.eval_path=FILE",
        f"tessera export checkpoint={run} output=DIR": "a checked Hugging Face folder",
    }
