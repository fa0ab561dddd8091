"""What the jobs of a sweep came to: one row each, the best first."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.sweep_plan import SweepJob, exit_code

TRAIN = "train loss"
RESULTS = "sweep.json"


def results(jobs: list[SweepJob], codes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a row for each job, sorted by its best number; `codes` are those of this sweep."""
    from trainer.callbacks.card import is_lower_better

    rows = [_row(job, codes.get(job.name)) for job in jobs]
    if any(row["metric"] != TRAIN for row in rows):  # the two are not to be compared
        rows = [row | {"best": None} if row["metric"] == TRAIN else row for row in rows]
    sign = 1 if is_lower_better(jobs[0].best) else -1
    return sorted(rows, key=lambda row: _rank(row["best"], sign))


def _rank(best: Any, sign: int) -> float:
    return sign * best if isinstance(best, float) and math.isfinite(best) else math.inf


def _row(job: SweepJob, code: int | None) -> dict[str, Any]:
    """Return what a job has to show; what it has not is None."""
    from trainer.callbacks.card import best_of
    from trainer.points import LOSS, read_points

    points = read_points(job.folder)
    train, evals = points.train, points.evals
    train_loss = _plain(train.last(LOSS)) if train.steps else None
    metric, row = best_of(evals, job.best) if evals.steps else (LOSS, 0)
    return {
        "name": job.name,
        "varied": job.varied,
        "steps": max([*train.steps[-1:], *evals.steps[-1:]], default=None),
        "train_loss": train_loss,
        "metric": f"eval {metric}" if evals.steps else TRAIN,
        "best": _plain(evals.column(metric)[row]) if evals.steps else train_loss,
        "best_step": evals.steps[row] if evals.steps else None,
        "tokens_per_second": points.speed,
        "exit_code": exit_code(job.folder) if code is None else code,
        "folder": str(job.folder),
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "NaN"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as aligned lines below a line of names."""
    keys = list(rows[0]["varied"])
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["best"] is not None))
    heads = [*keys, "steps", "train loss", f"best {' or '.join(metrics) or 'loss'}", "at step",
             "tokens/s", "exit"]  # fmt: skip
    cells = [[*row["varied"].values(), *map(_shown, _numbers(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if number < len(keys) else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *cells]
    ]


def _numbers(row: dict[str, Any]) -> list[Any]:
    speed = row["tokens_per_second"]
    return [row["steps"], row["train_loss"], row["best"], row["best_step"],
            None if speed is None else round(speed), row["exit_code"]]  # fmt: skip


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def record(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows as sweep.json, whole or not at all."""
    from trainer.files import write_json

    write_json(folder / RESULTS, {"jobs": rows})
    return folder / RESULTS


def conclude(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Record the rows and print them as a table."""
    print("\n".join(["", *table(rows), "", str(record(folder, rows))]), flush=True)
