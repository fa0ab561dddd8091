"""The whole page of a run, and the file that it becomes."""

import sys
from html import escape
from pathlib import Path

from launch.report import sections
from launch.report.axes import short
from launch.report.chart import NUM_STYLES, Chart, Line, Mark, svg
from launch.report.charts import charts_of, marks_of, span_of
from launch.report.history import History, read_history
from launch.report.planned import planned
from launch.report.words import commands, duration, outcome, said_time, summary
from trainer.columns import exact
from trainer.files import write_text
from trainer.notes import REPORT
from trainer.page import data_block, page
from trainer.points import LOSS
from trainer.redaction import redact

_HERE = Path(__file__).parent
_SYMBOLS = {  # of what happened, above a chart: told apart by their shape
    "restart": ("M0 2L5 10H-5Z", "started again"),
    "rewind": ("M-5 6L4 1V11Z", "went back to a checkpoint"),
    "skipped": ("M-4 2L4 10M4 2L-4 10", "step skipped, or loss not finite"),
    "failed": ("M-4 2H4V10H-4Z", "save failed"),
}


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run and return its file; ValueError for a folder that is no run."""
    output = output or folder / REPORT
    write_text(output, report_page(read_history(folder)))
    return output


def try_report(folder: Path) -> None:
    """Write the page of a run that has ended, which is over and must not fail for it."""
    try:
        write_report(folder)
    except Exception as error:  # whatever it is, the run's own exit code says how the run went
        said = redact(" ".join(f"{type(error).__name__}: {error}".split()))
        sys.stderr.write(f"tessera: no report was written ({said}); tessera report run={folder}\n")


def report_page(history: History) -> str:
    """Return the page as one HTML text."""
    charts, marks = charts_of(history), marks_of(history)
    span = span_of(charts)
    body = [
        _top(history),
        sections.section("In words", _summary(history)),
        sections.section("Predicted and measured", planned(history)),
        _curves(charts, marks, span),
        sections.section("Evaluations", sections.evaluations(history)),
        sections.section("Samples", sections.samples(history)),
        sections.section("Data", sections.sources(history)),
        sections.section("Starts and faults", sections.faults(history)),
        sections.section("Config", sections.config(history)),
        sections.section("Environment", sections.environment(history)),
    ]
    data = {
        "charts": [chart.plain() for chart in charts],
        "marks": [[mark.step, mark.kind, redact(mark.text)] for mark in marks],
        "span": span,
    }
    return page(
        f"Run {history.name}",
        style=(_HERE / "report.css").read_text(),
        body="\n".join([part for part in body if part] + [data_block("data", data)]),
        script=(_HERE / "charts.js").read_text(),
    )


def _top(history: History) -> str:
    kind, text = outcome(history)
    sign = {"good": "&#10003;", "bad": "&#10007;", "open": "&#8226;"}[kind]
    where = " &middot; ".join(escape(redact(part)) for part in sections.written(history))
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in _tiles(history)
    )
    return (
        f'<p class="outcome {kind}"><b>{sign}</b> {escape(redact(text))}</p>'
        f'<p class="note where">{where}</p><dl class="tiles">{tiles}</dl>'
    )


def _tiles(history: History) -> list[tuple[str, str, str]]:
    """Return the few numbers that everybody looks for first: name, number, and beside it."""
    train, evals = history.points.train, history.points.evals
    whole = f"of {history.max_steps:,}" if history.max_steps else ""
    tiles = [("Steps", f"{history.last_step:,}", whole)]
    for name, columns in (("Training loss", train), ("Evaluation loss", evals)):
        _, losses = columns.series(LOSS)
        if len(losses):
            tiles.append((name, f"{losses[-1]:.4g}", f"from {losses[0]:.4g}"))
    if (speed := history.points.speed) is not None:
        tiles.append(("Throughput", short(round(speed)), "tokens/s"))
    _, memory = train.series("memory_gib")
    if len(memory):
        tiles.append(("Peak memory", exact(round(max(memory), 2)), "GiB, rank 0"))
    if seconds := duration(history):
        tiles.append(("Time", said_time(seconds), ""))
    return tiles


def _summary(history: History) -> str:
    said = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(redact(text))}</dd></div>"
        for name, text in summary(history).items()
    )
    typed = "".join(
        f"<li><code>{escape(redact(command))}</code> {escape(what)}</li>"
        for command, what in commands(history).items()
    )
    more = f'<h3>How to go on</h3><ul class="commands">{typed}</ul>' if typed else ""
    return f'<dl class="words">{said}</dl>{more}'


def _curves(charts: list[Chart], marks: list[Mark], span: tuple[float, float]) -> str:
    if not charts:
        return sections.section("Curves", "<p>No point was logged yet.</p>")
    kinds = [kind for kind in _SYMBOLS if any(mark.kind == kind for mark in marks)]
    symbols = "".join(f'<path id="{k}" d="{path}"/>' for k, (path, _) in _SYMBOLS.items())
    legend = "".join(
        f'<li><svg viewBox="-7 0 14 12" class="key mark {kind}" aria-hidden="true">'
        f'<use href="#{kind}"/></svg>{escape(_SYMBOLS[kind][1])}</li>'
        for kind in kinds
    )
    figures = "".join(_figure(number, chart, span, marks) for number, chart in enumerate(charts))
    return (
        f'<section class="curves"><h2>Curves</h2>'
        f'<svg class="symbols" aria-hidden="true"><defs>{symbols}</defs></svg>{_tools()}'
        f'<ul class="legend">{legend}</ul><div class="charts">{figures}</div></section>'
    )


def _tools() -> str:
    """Return what only a script can do: hidden where there is none."""
    return (
        '<div class="tools" hidden><button type="button" id="whole" disabled>Whole run</button>'
        '<label>Smoothing <select id="smooth"><option value="1">none</option>'
        '<option value="5">mean of 5 points</option><option value="21">mean of 21 points</option>'
        '<option value="101">mean of 101 points</option></select></label>'
        '<label>Colours <select id="theme"><option value="light dark">as the system</option>'
        '<option value="light">light</option><option value="dark">dark</option></select></label>'
        '<span class="note">Drag to zoom, double-click for the whole run. With the keyboard: '
        "arrows move, + and - zoom, L is the log scale.</span></div>"
    )


def _figure(number: int, chart: Chart, span: tuple[float, float], marks: list[Mark]) -> str:
    keys = "".join(map(_key, chart.lines))
    each = max(line.curve.points_each for line in chart.lines)
    thinned = (
        f'<p class="note">each point is the mean of about {each:,.0f} log points, the band their '
        "lowest and highest</p>"
        if each > 1
        else ""
    )
    log = (
        f'<label class="log" hidden><input type="checkbox"{" checked" if chart.is_log else ""}> '
        "log scale</label>"
        if chart.can_be_log
        else ""
    )
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    return (
        f'<figure data-chart="{number}"><figcaption><h3>{escape(redact(chart.title))}{unit}</h3>'
        f'{log}<div class="keys">{keys}</div></figcaption>{svg(chart, span, marks)}'
        f'<output aria-live="polite"></output>{thinned}</figure>'
    )


def _key(line: Line) -> str:
    return (
        '<span><svg viewBox="0 0 26 8" class="key" aria-hidden="true">'
        f'<path class="line s{line.style % NUM_STYLES}" d="M0 4H26"/></svg>'
        f"{escape(redact(line.name))}</span>"
    )
