"""The card at the end of a run: how it ended, from where to where the loss went, how fast it was.

All is read off metrics.jsonl, which holds the starts before this one too.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from trainer.best import BestSpec
from trainer.progress import TOKENS

Points = Sequence[dict[str, Any]]
MAX_NUMBERS = 4  # of an evaluation, beside the loss


def card(
    points: Points, best: BestSpec, *, name: str, step: int, max_steps: int, seconds: float,
    first_step: int, finished: bool,
) -> dict[str, str]:  # fmt: skip
    """Return one line each on the end of a run, by a name; `seconds` are those since
    `first_step`."""
    verb = "finished" if finished else "stopped and saved"
    took = str(timedelta(seconds=round(seconds)))
    since = f" since step {first_step}" if first_step else ""
    lines = {"run": f"{name} {verb}: {step:,} of {max_steps:,} steps, {took}{since}"}
    train = [point for point in points if point["split"] == "train"]
    evaluations = [point for point in points if point["split"] == "eval"]
    if train:
        lines["loss"] = f"{_number(train[0]['loss'])} at step {train[0]['step']:,}"
        if len(train) > 1:
            lines["loss"] += f" -> {_number(train[-1]['loss'])} at step {train[-1]['step']:,}"
        speed = median(float(point[TOKENS]) for point in train)
        lines["speed"] = (
            f"{speed:,.0f} tokens/s (median of log points), {train[-1]['tokens']:,} tokens in all"
        )
    if evaluations:
        lines["eval"] = _best_line(evaluations, best)
    return lines


def best_of(evaluations: Points, spec: BestSpec) -> tuple[str, dict[str, Any]]:
    """Return the number that evaluations are judged by, and the best of them by it."""
    metric = spec.metric or "loss"
    judged = [point for point in evaluations if metric in point] or list(evaluations)
    lower = is_lower_better(spec)
    return metric, min(judged, key=lambda point: _rank(point.get(metric), lower))


def is_lower_better(spec: BestSpec) -> bool:
    """Return which way evaluations are judged; by the loss where nothing else is said."""
    return spec.metric is None or spec.lower_is_better


def _rank(value: Any, lower: bool) -> float:
    number = float(value) if value is not None else math.nan  # "NaN" is a number's text
    return math.inf if math.isnan(number) else number if lower else -number


def _best_line(evaluations: Points, spec: BestSpec) -> str:
    metric, point = best_of(evaluations, spec)
    names = [
        name for name, value in point.items()
        if isinstance(value, float) and name not in ("time", metric) and "/" not in name
    ]  # fmt: skip
    rest = ", ".join(f"{n.replace('_', ' ')} {_number(point[n])}" for n in names[:MAX_NUMBERS])
    best = f"best {metric.replace('_', ' ')} {_number(point.get(metric, 'none'))}"
    return f"{best} at step {point['step']:,}, of {len(evaluations)}" + (
        f"; {rest}" if rest else ""
    )


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def next_commands(folder: Path, *, writes_text: bool, finished: bool) -> list[str]:
    """Return what can be done with a run now."""
    if not finished:
        return ["the same command again goes on from here"]
    generate = [f'tessera generate checkpoint={folder} prompt="..."'] if writes_text else []
    return [
        *generate,
        f"tessera evaluate checkpoint={folder}",
        f"tessera export checkpoint={folder} output=DIR",
        f"tessera report run={folder}",
    ]
