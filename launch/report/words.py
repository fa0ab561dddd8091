"""What a run did, in plain words: what, on what, how far, how well, how fast, what went wrong."""

import shlex
import statistics
from collections.abc import Iterator

from launch.exit_codes import FINISHED, MEANINGS, PREEMPTED
from launch.report.history import History, part
from trainer.best import BestSpec
from trainer.callbacks.card import best_in_words, loss_in_words, next_commands, speed_in_words
from trainer.columns import exact, number
from trainer.points import TIME

SHOWN = 6  # mishaps that are named one by one


def summary(history: History) -> dict[str, str]:
    """Return a few sentences by their subject; a subject of which nothing is known is left out."""
    found = {
        "Trained": _trained(history),
        "On": _data(history),
        "How far": _how_far(history),
        "How well": _how_well(history),
        "How fast": _how_fast(history),
        "What went wrong": _mishaps(history),
    }
    return {name: text for name, text in found.items() if text}


def outcome(history: History) -> tuple[str, str]:
    """Return `good`, `bad` or `open`, and how the newest start ended."""
    if not history.past.starts:
        return "open", "no start left a record"
    code, reason = history.past.starts[-1].ending
    if code == FINISHED:
        return "good", "finished"
    if code is None or code == PREEMPTED:
        return "open", reason
    return "bad", f"{reason} (exit code {code}: {MEANINGS.get(code, 'unknown')})"


def _trained(history: History) -> str:
    about = history.about
    model = str(part(history.config, "model").get("_target_", "")).rpartition(".")[2]
    whole, trained = about.get("parameters", 0), about.get("trained_parameters", 0)
    parts = [model.removesuffix("Spec")]
    if whole:
        share = f", {_count(trained)} of them trained ({trained / whole:.2%})"
        parts.append(f"{_count(whole)} parameters{share if trained else ''}")
    parts.append(str(part(about, "banner").get("layout", "")))
    return "; ".join(part for part in parts if part)


def _data(history: History) -> str:
    about, data = history.about, part(history.config, "data")
    parts = [str(data["path"]) if data.get("path") else ", ".join(part(data, "sources"))]
    if "documents" in about and "tokens" in about:
        parts.append(f"{about['documents']:,} documents, {about['tokens']:,} tokens")
    if "held_out_documents" in about:
        parts.append(f"documents held out: {about['held_out_documents']:,}")
    return "; ".join(part for part in parts if part)


def _how_far(history: History) -> str:
    whole = history.max_steps
    parts = [f"step {history.last_step:,}" + (f" of {whole:,}" if whole else "")]
    epochs = history.about.get("epochs", {})
    if epochs and whole:
        share = history.last_step / whole
        each = [f"{name} {passes * share:.3g}".strip() for name, passes in epochs.items()]
        parts.append(f"{', '.join(each)} epochs")
    count = len(history.past.starts)
    if count > 1:
        parts.append(f"{count} starts")
    saved = history.checkpoints
    parts.append(f"newest checkpoint: step {saved[0]:,}" if saved else "no checkpoint")
    return "; ".join(parts)


def _how_well(history: History) -> str:
    points = history.points
    found = {
        "training loss": loss_in_words(points.train),
        "evaluation:": best_in_words(points.evals, _best(history)),
    }
    return "; ".join(
        [*(f"{name} {text}" for name, text in found.items() if text), *_compared(history)]
    )


def _best(history: History) -> BestSpec:
    """Return what the run calls better."""
    known = part(history.config, "best")
    metric, goal = known.get("metric"), known.get("goal")
    if not isinstance(metric, str):
        return BestSpec()
    return BestSpec(metric=metric, goal=goal if goal in ("min", "max") else "auto")


def _compared(history: History) -> Iterator[str]:
    """Yield how the last evaluation stands against what needs no such model."""
    last, note = history.points.last_eval, history.baselines
    metric, values = str(note.get("metric", "")), note.get("values", {})
    ours = last.get(metric)
    if isinstance(ours, int | float) and isinstance(values, dict):
        others = [f"{name} {exact(number(value))}" for name, value in values.items()]
        yield f"{metric.replace('_', ' ')} {exact(ours)}, against {', '.join(others)}"
    for name, value in last.items():
        if name.endswith("question_only") and isinstance(value, int | float):
            yield f"the question alone, images unseen: {exact(value)}"


def _how_fast(history: History) -> str:
    train = history.points.train
    parts = [said] if (said := speed_in_words(history.points)) else []
    _, shares = train.series("mfu")
    if len(shares):
        parts.append(f"MFU {statistics.median(shares):.1%}")
    _, waits = train.series("data_wait_fraction")
    if len(waits):
        parts.append(f"{statistics.fmean(waits):.1%} of the time waiting for data")
    _, memory = train.series("memory_gib")
    if len(memory):
        parts.append(f"{max(memory):.2f} GiB at most on rank 0")
    seconds = duration(history)
    if seconds:
        parts.append(f"{said_time(seconds)} from the first point to the last")
    return "; ".join(parts)


def _mishaps(history: History) -> str:
    past = history.past
    found = [
        f"start {start.number:03d} ended with {f'exit code {code}' if code else 'no record'}: {why}"
        for start in past.starts
        for code, why in [start.ending]
        if code != 0 and (code is not None or start is not past.starts[-1])
    ]
    found += [f"went back from step {spike} to {step}" for spike, step in past.rewinds]
    found += [
        f"step {each.step} was skipped ({each.why or 'no reason noted'})" for each in past.skipped
    ]
    failed = [line["step"] for line in history.points.others if line.get("ckpt_failed")]
    found += [f"the save of step {step} failed" for step in failed]
    found += [f"the loss logged at step {step} is not finite" for step in history.points.not_finite]
    if history.points.num_torn:
        found.append(f"{history.points.num_torn} lines of metrics.jsonl cannot be read")
    found += history.problems
    more = [f"and {len(found) - SHOWN} more, see below"] if len(found) > SHOWN else []
    return "\n".join([*found[:SHOWN], *more]) if found else "nothing that the run knows of"


def commands(history: History) -> dict[str, str]:
    """Return what to type next, and what it does."""
    run = shlex.quote(str(history.folder))
    words = " ".join(map(shlex.quote, history.past.command))
    found: dict[str, str] = {}
    if words and not history.is_finished:
        found[f"tessera train {words}"] = "goes on from the newest checkpoint"
    if history.checkpoints:
        found |= next_commands(history.folder, history.about.get("asks", ""))
    if history.past.starts:
        found[f"tessera ledger run={run}"] = "proves that every sample was trained on exactly once"
    for each in history.past.skipped[:1]:
        found[f"tessera replay run={run} step={each.step}"] = "the documents of the skipped step"
    return found


def duration(history: History) -> float:
    """Return the seconds from the first point to the last one; 0: unknown."""
    columns = (history.points.train, history.points.evals)
    times = [time for column in columns for time in (column.first(TIME), column.last(TIME))]
    known = [time for time in times if time == time]
    return max(known) - min(known) if known else 0.0


def said_time(seconds: float) -> str:
    """Return a time as a person says it."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{int(minutes)} min {seconds % 60:.0f} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if days < 2 else f"{days:.1f} days"


def _count(count: int) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:,}"
