"""Which curves a run has: loss, evaluations, gradient, rate, speed, memory, and each source."""

import math
from collections.abc import Iterator

from launch.report.chart import Chart, Line, Mark
from launch.report.history import History
from launch.report.thin import thinned
from trainer.columns import Columns
from trainer.points import LOSS, TIME

MAX_MARKS = 300
MAX_LINES = 12  # sources in one chart
_KNOWN = {  # title, unit, factor
    "grad_norm": ("Gradient norm", "L2, of the step", 1.0),
    "lr": ("Learning rate", "", 1.0),
    "tokens_per_second": ("Throughput", "tokens per second, all ranks", 1.0),
    "images_per_second": ("Images", "per second, all ranks", 1.0),
    "mfu": ("Model FLOPs utilisation", "% of the peak", 100.0),
    "memory_gib": ("Memory", "GiB, the most so far, rank 0", 1.0),
    "data_wait_fraction": ("Waiting for data", "% of the time", 100.0),
}
_COUNTS = ("num_targets", "tokens", "images", "skipped_steps", "onlookers_per_second")


def charts_of(history: History) -> list[Chart]:
    """Return the charts of a run in the order of the page."""
    found = [*_loss(history), *_sources(history), *_evaluations(history), *_training(history)]
    return [chart for chart in found if chart.lines]


def _loss(history: History) -> Iterator[Chart]:
    is_text = str(history.config.get("task", {})).find("CausalLM") >= 0
    lines = [
        *_lines(history.points.train, {LOSS: "train"}),
        *_lines(history.points.evals, {LOSS: "evaluation"}, first_style=1),
    ]
    yield Chart(title="Loss", unit="nats per token" if is_text else "per target", lines=lines)


def _sources(history: History) -> Iterator[Chart]:
    for columns, title in (
        (history.points.train, "Training loss by source"),
        (history.points.evals, "Evaluation loss by source"),
    ):
        names = [name for name in columns.names if name.startswith(f"{LOSS}/")]
        shown = {name: name.partition("/")[2] for name in sorted(names)[:MAX_LINES]}
        yield Chart(title=title, unit="per target", lines=_lines(columns, shown))


def _evaluations(history: History) -> Iterator[Chart]:
    columns = history.points.evals
    for name in sorted(columns.names):
        if name not in (LOSS, TIME) and not name.startswith("num_") and "/" not in name:
            title = f"Evaluation: {name.replace('_', ' ')}"
            yield Chart(title=title, unit="", lines=_lines(columns, {name: "evaluation"}, 1))


def _training(history: History) -> Iterator[Chart]:
    columns = history.points.train
    others = [
        name
        for name in sorted(columns.names)
        if name not in (LOSS, TIME, *_KNOWN, *_COUNTS) and "/" not in name
    ]
    for name in [*_KNOWN, *others]:
        title, unit, factor = _KNOWN.get(name, (name.replace("_", " "), "", 1.0))
        lines = _lines(columns, {name: "train"}, factor=factor)
        chart = Chart(title=title, unit=unit, lines=lines)
        is_log = name == "grad_norm" and bool(lines) and chart.can_be_log and _spread(chart) > 100
        yield Chart(title=title, unit=unit, lines=lines, is_log=is_log)


def _spread(chart: Chart) -> float:
    values = [value for line in chart.lines for value in line.curve.means]
    return max(values) / min(values)


def _lines(
    columns: Columns, names: dict[str, str], first_style: int = 0, factor: float = 1.0
) -> list[Line]:
    lines = []
    for number, (name, shown) in enumerate(names.items()):
        steps, values = columns.series(name)
        if factor != 1.0:
            values = type(values)("d", [value * factor for value in values])
        if len(steps):
            curve = thinned(steps, values)
            lines.append(Line(name=shown, curve=curve, style=first_style + number))
    return lines


def marks_of(history: History) -> list[Mark]:
    """Return what happened, in the order of steps."""
    past, points = history.past, history.points
    marks = [Mark(step=s, kind="restart", text=f"started again at step {s}") for s in past.restarts]
    marks += [
        Mark(step=spike, kind="rewind", text=f"step {spike}: back to the checkpoint of step {step}")
        for spike, step in past.rewinds
    ]
    marks += [
        Mark(
            step=each.step,
            kind="skipped",
            text=f"step {each.step} skipped: {each.why or 'no reason noted'}",
        )
        for each in past.skipped
    ]
    marks += [
        Mark(step=line["step"], kind="failed", text=f"step {line['step']}: the save failed")
        for line in points.others
        if line.get("ckpt_failed")
    ]
    known = {mark.step for mark in marks}
    marks += [
        Mark(step=step, kind="skipped", text=f"loss logged at step {step} is not finite")
        for step in points.not_finite
        if step not in known
    ]
    marks.sort(key=lambda mark: mark.step)
    every = max(1, math.ceil(len(marks) / MAX_MARKS))
    return marks[::every]


def span_of(charts: list[Chart]) -> tuple[float, float]:
    """Return the first and the last step of all curves."""
    firsts = [line.curve.steps[0] for chart in charts for line in chart.lines]
    lasts = [line.curve.steps[-1] for chart in charts for line in chart.lines]
    return (min(firsts), max(lasts)) if firsts else (0.0, 1.0)
