"""`tessera diff`: what differs between two runs, and from which step on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.diff.series import Drift, column, compare, windows
from launch.diff.sides import (
    Pairs,
    Side,
    code_pairs,
    config_pairs,
    data_pairs,
    environment_pairs,
    side,
)
from launch.diff.terminal import lines_of
from launch.diff.trainer_state import against_state, read_state
from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.truth import truth
from launch.words import options_of

USAGE = """usage: tessera diff a=DIR b=DIR [only=losses,data,..] [json=true]

Compares two runs: config, code, environment, data, and the loss of every step, bit for bit: the
first step that differs, by how much there, the largest difference and the one at the end.
Exit code 1: something that was compared differs, or no loss could be compared.

  a=DIR       the folder of a run
  b=DIR       another one, or the trainer_state.json of a Hugging Face Trainer
  only=..     some of config, code, environment, data, losses; default: all
  json=true   everything as one JSON object
"""
CONFIG, CODE, ENVIRONMENT, DATA, LOSSES = "config", "code", "environment", "data", "losses"
SECTIONS = (CONFIG, CODE, ENVIRONMENT, DATA, LOSSES)
_PAIRS = {
    CONFIG: config_pairs,
    CODE: code_pairs,
    ENVIRONMENT: environment_pairs,
    DATA: data_pairs,
}


def main(arguments: list[str]) -> int:
    """Run `tessera diff` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return FINISHED
    needed, defaults = {"a": "DIR", "b": "DIR"}, {"json": "false"}
    options = options_of("diff", arguments, needed=needed, defaults=defaults, optional=["only"])
    is_json = truth("json", options["json"])
    a, b = (Path(options[key]).expanduser() for key in ("a", "b"))
    pairs, drifts = compared(a, b, _sections(options.get("only")))
    is_equal = not any(pairs.values()) and all(drift.is_equal for drift in drifts)
    is_equal = is_equal and all(drift.num_common for drift in drifts[:1])  # of the losses
    if is_json:
        found: dict[str, Any] = {"a": str(a), "b": str(b), "equal": is_equal, **pairs}
        print(json.dumps(found | {LOSSES: [drift.plain() for drift in drifts]}))
    else:
        print("\n".join(lines_of(a, b, pairs, drifts)))
    return FINISHED if is_equal else CHECK_FAILED


def _sections(only: str | None) -> tuple[str, ...]:
    if only is None:
        return SECTIONS
    wanted = tuple(only.strip("[]").split(","))
    for name in wanted:
        if name not in SECTIONS:
            raise ValueError(f"only={name} is no section; set some of {', '.join(SECTIONS)}")
    return wanted


def compared(a: Path, b: Path, wanted: tuple[str, ...]) -> tuple[dict[str, Pairs], list[Drift]]:
    """Return what differs of each section, and how the numbers stand to each other."""
    ours = side("a", a)
    if b.is_file():
        if not ours.losses:
            raise ValueError(f"a={a} holds no ledger, which has the loss of every step; give a run")
        return {}, list(against_state(ours.losses, ours.points, read_state(b)))
    theirs = side("b", b)
    pairs = {name: _PAIRS[name](ours, theirs) for name in wanted if name in _PAIRS}
    return pairs, list(_numbers(ours, theirs)) if LOSSES in wanted else []


def _numbers(a: Side, b: Side) -> Iterator[Drift]:
    yield _loss(a, b)
    for name in ("grad_norm", "lr"):
        pair = column(a.points.train, name), column(b.points.train, name)
        if all(pair):
            yield compare(name, *pair, note="at common log points")
    evals = column(a.points.evals, "loss"), column(b.points.evals, "loss")
    if all(evals):
        yield compare("evaluation loss", *evals, note="at common evaluations")


def _loss(a: Side, b: Side) -> Drift:
    """Compare the loss of every step; without ledgers, of the log points that mean the same."""
    if a.losses and b.losses:
        first, second = ({s: loss.mean for s, loss in each.losses.items()} for each in (a, b))
        return compare(
            "loss", first, second, note="of each step, from the ledgers",
            is_same=lambda step: a.losses[step] == b.losses[step],
        )  # fmt: skip
    pair = windows(a.points.train), windows(b.points.train)
    common = pair[0].keys() & pair[1].keys()
    first, second = ({step: each[since, step] for since, step in common} for each in pair)
    return compare("loss", first, second, note="of log points that cover the same steps")
