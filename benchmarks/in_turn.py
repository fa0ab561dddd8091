"""What comparisons of training loops share: options, contenders in turn, the machine, spreads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from trainer.environment import environment

Part = TypeVar("Part")
Spread = dict[str, float]
"""`median`, `min` and `max` over the rounds."""


def read_options(words: list[str], known: Iterable[Field[Any]]) -> dict[str, Any]:
    """Read key=value words into fields, and `model=`, `model.FIELD=` into the field `model`.

    ValueError names the nearest key.
    """
    types = {field.name: field.type for field in known}
    model, values = {"model": "llama_tiny"}, dict[str, Any]()
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"{word!r} is no option; write key=value, for example rounds=3")
        if key == "model" or key.startswith("model."):
            model[key] = value
        elif key not in types:
            near = get_close_matches(key, types, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"unknown key {key}; {hint}Known: {', '.join(sorted(types))}, model.FIELD"
            )
        elif types[key] is int and not value.isdecimal():
            raise ValueError(f"{key}={value!r} is no whole number; set it to 1 or more")
        else:
            values[key] = int(value) if types[key] is int else value
    return values | {"model": tuple(f"{key}={value}" for key, value in model.items())}


def read_texts(words: list[str], defaults: dict[str, str]) -> dict[str, str]:
    """Read key=value words as texts; ValueError for a key that has no default."""
    options = dict(defaults)
    for word in words:
        key, separator, value = word.partition("=")
        if key not in options or not separator:
            known = ", ".join(options)
            raise ValueError(f"{word} is unknown; set one of {known}, as key=value")
        options[key] = value
    return options


def chosen(given: str, known: Mapping[str, Part], option: str = "only") -> dict[str, Part]:
    """Return what a comma list, the value of `option`, names; ValueError for an unknown one."""
    names = given.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{option}={name} is unknown; set it to some of {', '.join(known)}")
    return {name: known[name] for name in names}


def check_positive(settings: Any) -> None:
    """Raise ValueError for a whole number below 1."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type is int and value < 1:
            raise ValueError(f"{field.name}={value} is not positive; set it to 1 or more")


def run_rounds(
    module: str, sides: Iterable[str], inputs: Path, *, rounds: int, threads: int
) -> list[dict[str, dict[str, Any]]]:
    """Run `python -m module SIDE` of all sides in turn, `rounds` times; return what each left."""
    found = []
    for number in range(1, rounds + 1):
        curves = {}
        for side in sides:
            print(f"round {number} of {rounds}: {side}", file=sys.stderr, flush=True)
            curves[side] = _run_side(module, side, inputs, inputs / f"{side}-{number}", threads)
        found.append(curves)
    return found


def _run_side(module: str, side: str, inputs: Path, output: Path, threads: int) -> dict[str, Any]:
    """Run one side in a fresh process, so that its memory and its caches are its own.

    It sees one GPU: with several, the Trainer would share its rows out to them.
    """
    output.mkdir()
    device, _, _ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")
    words = ["-m", module, side, str(inputs), str(output), str(threads)]
    with open(output / "output.txt", "w+") as log:
        done = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": device},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            log.seek(0)
            raise ChildProcessError(f"{side}: exit code {done.returncode}\n{log.read()[-4000:]}")
    curve: dict[str, Any] = json.loads((output / "curve.json").read_text())
    return curve


def append_row(results: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of benchmarks/results."""
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def machine() -> dict[str, Any]:
    """Return what a result row says of the machine."""
    known = environment(world_size=1)
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else "unknown CPU",
        **{key: known[key] for key in ("cpus", "devices", "platform", "python", "git_commit")},
    }


def spread(values: list[float]) -> Spread:
    """Return median, min and max."""
    found = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def show(values: Spread, digits: int) -> str:
    """Return `median [min - max]`."""
    middle, low, high = (f"{values[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} [{low} - {high}]"
