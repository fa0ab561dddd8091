"""The parts of the page below the curves: tables, samples, config and environment."""

import time
from collections.abc import Iterator
from html import escape
from typing import Any

from launch.report.history import History, part
from trainer.columns import exact
from trainer.drift import flatten
from trainer.page import shown_image, table, terms
from trainer.points import LOSS, TIME

MAX_ROWS = 40
MAX_LABELS = 20
NUMBERS = "numbers"


def section(name: str, body: str, note: str = "") -> str:
    """Return a part of the page with its heading; nothing where there is nothing to show."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(name)}</h2>{said}{body}</section>" if body else ""


def evaluations(history: History) -> str:
    """Return every evaluation as a row; of many the first, the last and some between."""
    columns = history.points.evals
    names = [name for name in sorted(columns.names) if "/" not in name and name != TIME]
    if not columns.steps:
        return ""
    kept = _some(len(columns.steps))
    found = [columns.column(name) for name in names]
    rows = [[f"{columns.steps[row]:,}", *(_cell(column[row]) for column in found)] for row in kept]
    left_out = len(columns.steps) - len(kept)
    note = f", {left_out} of them left out" if left_out else ""
    heads = ["step", *(name.replace("_", " ") for name in names)]
    shown = table(f"All {len(columns.steps)} evaluations{note}", heads, rows)
    return _wide(shown, NUMBERS) + _confusion(history.points.last_eval.get("confusion"))


def _some(count: int) -> list[int]:
    if count <= MAX_ROWS:
        return list(range(count))
    return sorted({round(row * (count - 1) / (MAX_ROWS - 1)) for row in range(MAX_ROWS)})


def _confusion(found: Any) -> str:
    try:
        labels, counts = list(map(str, found["labels"])), found["rows_are_truth"]
        if len(labels) > MAX_LABELS:
            return ""
        rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    except (TypeError, LookupError, ValueError):
        return ""
    title = "Last evaluation: rows are the truth, columns the answer"
    return _wide(table(title, ["", *labels], rows), NUMBERS)


def sources(history: History) -> str:
    """Return what each source of the data gave, and how well it is known."""
    train, evals = history.points.train, history.points.evals
    found = {n.partition("/")[2] for c in (train, evals) for n in c.names if "/" in n}
    settings = part(part(history.config, "data"), "sources")
    totals = {name: sum(train.series(f"num_targets/{name}")[1]) for name in found}
    rows = [
        [
            name,
            str(part(settings, name).get("weight", "")),
            f"{totals[name]:,.0f}",
            f"{totals[name] / max(1.0, sum(totals.values())):.1%}",
            _last(train.series(f"{LOSS}/{name}")[1]),
            _last(evals.series(f"{LOSS}/{name}")[1]),
        ]
        for name in sorted(found)
    ]
    if not rows:
        return terms(_one_source(history))
    heads = ["source", "weight", "targets", "share", "last training loss", "last evaluation loss"]
    return _wide(table("By source", heads, rows), NUMBERS)


def _one_source(history: History) -> dict[str, str]:
    about, data = history.about, part(history.config, "data")
    found = {"path": data.get("path"), **{k: about.get(k) for k in ("documents", "tokens")}}
    shown = {name: _said(value) for name, value in found.items() if value is not None}
    if "held_out_documents" in about:
        shown["held out"] = f"{_said(about['held_out_documents'])} documents"
    if "fingerprint" in about:
        shown["fingerprint"] = str(about["fingerprint"])
    return shown


def faults(history: History) -> str:
    """Return how every start went, and what was skipped."""
    rows = []
    for start in history.past.starts:
        code, reason = start.ending
        span = (
            "none" if start.first_step is None else f"{start.first_step:,} to {start.last_step:,}"
        )
        changed = "; ".join(f"{key}: {was} -> {now}" for key, (was, now) in start.changes.items())
        said = f"{reason}{f' (changed: {changed})' if changed else ''}"
        rows.append([f"{start.number:03d}", span, "-" if code is None else str(code), said])
    found = (
        _wide(table("Starts", ["start", "steps", "exit code", "how it ended"], rows))
        if rows
        else ""
    )
    if history.past.skipped:
        lines = [
            [f"{e.step:,}", f"{e.attempt:03d}", e.why or "not noted"] for e in history.past.skipped
        ]
        found += _wide(table("Skipped steps", ["step", "start", "why"], lines[:MAX_ROWS]))
    if history.past.rewinds:
        pairs = [[f"{spike:,}", f"{step:,}"] for spike, step in history.past.rewinds]
        found += _wide(
            table("Rewinds", ["from step", "back to the checkpoint of step"], pairs), NUMBERS
        )
    return found


def samples(history: History) -> str:
    """Return what the model wrote, and what it answered."""
    parts, sample = [], history.sample
    if sample.get("text"):
        said = f"step {_said(sample.get('step'))}, temperature {_said(sample.get('temperature'))}"
        prompt, text = str(sample.get("prompt", "")), str(sample["text"])
        rest = text.removeprefix(prompt) if text.startswith(prompt) else text
        mark = f"<mark>{escape(prompt)}</mark>" if rest != text else ""
        parts.append(f'<p class="note">{escape(said)}</p><pre>{mark}{escape(rest)}</pre>')
    shown = history.answers.get("shown")
    if isinstance(shown, list):
        cards = "".join(_card(one) for one in shown if isinstance(one, dict))
        title = escape(str(history.answers.get("title", "")))
        parts.append(f'<p class="note">answers of {title}</p><div class="cards">{cards}</div>')
    return "".join(parts)


def _card(one: dict[str, Any]) -> str:
    pictures = one.get("pictures")
    drawn = "".join(
        shown_image(str(url), label=f"image {place}")
        for place, url in enumerate(pictures if isinstance(pictures, list) else [], start=1)
    )
    is_right = one.get("is_right") is True
    said = {name: str(one.get(name, "")) for name in ("question", "reference", "answer")}
    verdict = "right" if is_right else "not the reference"
    return (
        f'<div class="card {"right" if is_right else "wrong"}">{drawn}<div>{terms(said)}'
        f'<p class="note">{verdict}; {escape(str(one.get("source", "")))}</p></div></div>'
    )


def config(history: History) -> str:
    """Return all settings, folded; what the command line set comes first."""
    tree, words = history.config, history.past.command
    if not tree:
        return ""
    own = dict(word.lstrip("+~").partition("=")[::2] for word in words if "=" in word)
    first = ""
    if own:
        first = f"<h3>Set on the command line</h3>{terms(own)}<h3>All settings</h3>"
    groups = {k: v for k, v in tree.items() if isinstance(v, dict) and v}
    scalars = {k: v for k, v in tree.items() if k not in groups}
    parts = [_group("run", scalars), *(_group(name, group) for name, group in groups.items())]
    return first + "".join(parts)


def _group(name: str, tree: dict[str, Any]) -> str:
    leaves = dict(flatten(tree))
    kind = str(leaves.pop("_target_", "")).rpartition(".")[2]
    about = ", ".join(part for part in (kind, f"{len(leaves)} settings" if leaves else "") if part)
    shown = terms({key: _said(value) for key, value in leaves.items()}) if leaves else ""
    head = f"<summary>{escape(name)} <small>{escape(about)}</small></summary>"
    return f"<details>{head}{shown}</details>"


def environment(history: History) -> str:
    """Return versions, commit and hardware."""
    shown = {key: _said(value) for key, value in flatten(history.environment)}
    return terms(shown) if history.environment else ""


def written(history: History) -> Iterator[str]:
    """Yield where the run lies, and when this page was made."""
    yield str(history.folder.resolve())
    yield time.strftime("written %Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _wide(found: str, kind: str = "") -> str:
    """Return a table that scrolls where it is too wide; `numbers`: all columns but the first."""
    return f'<div class="{f"wide {kind}".strip()}" tabindex="0">{found}</div>'


def _cell(value: float) -> str:
    return "" if value != value else exact(value)


def _last(values: Any) -> str:
    return exact(values[-1]) if len(values) else ""


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return ", ".join(map(_said, value)) or "none" if isinstance(value, list) else str(value)
