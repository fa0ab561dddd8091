"""How fast is our training step beside the Hugging Face Trainer's, and is it the same step?

    python -m benchmarks.train_step [key=value ...]
    python -m benchmarks.train_step precision=bf16 model=smollm2_135m rows=2 steps=12 rounds=2

Keys: `model=` a choice of configs/model, `model.FIELD=` its fields, `precision=` fp32 or bf16, and
the fields of Settings. Exit code 64: a key or value that does not fit.

What is measured. Both sides start from the same weight file and see the same rows in the same
order, with the same AdamW, learning rates and clip norm; each runs the whole loop that its users
get and logs each step. They run in turn, each in a fresh process. A step is the time between the
host's reads of two losses in a row; the first `warmup` steps are left out. A side's figure is the
median step of each round, then the median over rounds with min-max. The ratio is taken within each
round: what other jobs do to the machine hits neighbours in time alike. Peak memory is the process's
resident high-water mark (on CUDA: the allocator's) up to the last step, imports and weight loading
included; beside it what was held before step 1. A row is one document of the standard library in
bytes: no packing, no padding. A larger vocabulary is computed over in full, though only 258 of its
ids occur.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.train_step_inputs import prepare
from benchmarks.train_step_report import METHODS, report, summarise
from benchmarks.train_step_sides import SIDES, Curve
from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL
from trainer.environment import environment
from trainer.parallel.pieces import unique_parameters

RESULTS = Path(__file__).parent / "results" / "train_step.jsonl"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared, and how often."""

    model: tuple[str, ...]
    """Overrides of the group `model` and of its fields."""
    precision: str = "fp32"
    rows: int = 8
    """Rows of a step, all in one forward pass."""
    row_tokens: int = 256
    steps: int = 30
    """Steps of each side in each round."""
    warmup: int = 5
    """First steps of these, which are not timed and in which the learning rate warms up."""
    rounds: int = 5
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "steps", "warmup", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not positive; set it to 1 or more"
                )
        if self.row_tokens < 3:
            raise ValueError(f"row_tokens={self.row_tokens} has no room for text; set 3 or more")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} leaves nothing of steps={self.steps} to time")
        if self.precision not in METHODS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; set it to one of {', '.join(METHODS)}"
            )


def parse(words: list[str]) -> Settings:
    """Read key=value words; ValueError names the nearest key."""
    numbers = {field.name for field in fields(Settings) if field.type is int}
    known = ["model", "precision", *sorted(numbers)]
    model = {"model": "llama_tiny"}
    values: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"{word!r} is no option; write key=value, for example steps=30")
        if key == "model" or key.startswith("model."):
            model[key] = value
        elif key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown key {key}; {hint}Known: {', '.join(known)}, model.FIELD")
        elif key in numbers and not value.isdecimal():
            raise ValueError(f"{key}={value!r} is no whole number; set it to 1 or more")
        else:
            values[key] = int(value) if key in numbers else value
    return Settings(model=tuple(f"{key}={value}" for key, value in model.items()), **values)


def run_rounds(settings: Settings, inputs: Path) -> list[dict[str, Curve]]:
    """Run both sides in turn, `rounds` times; return the curve of each side of each round."""
    rounds = []
    for number in range(1, settings.rounds + 1):
        curves = {}
        for side in SIDES:
            print(f"round {number} of {settings.rounds}: {side}", file=sys.stderr, flush=True)
            curves[side] = _run_side(side, inputs, inputs / f"{side}-{number}", settings.threads)
        rounds.append(curves)
    return rounds


def _run_side(side: str, inputs: Path, output: Path, threads: int) -> Curve:
    """Run one side in a fresh process, so that its memory and its caches are its own."""
    output.mkdir()
    words = ["-m", "benchmarks.train_step_sides", side, str(inputs), str(output), str(threads)]
    with open(output / "output.txt", "w+") as log:
        done = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            log.seek(0)
            raise ChildProcessError(f"{side}: exit code {done.returncode}\n{log.read()[-4000:]}")
    return Curve(**json.loads((output / "curve.json").read_text()))


def _machine() -> dict[str, Any]:
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


def main(words: list[str]) -> int:
    """Compare, print, and append a row to results/train_step.jsonl; return the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return FINISHED
    try:
        settings = parse(words)
        with tempfile.TemporaryDirectory() as name:
            run = prepare(
                Path(name),
                overrides=[*settings.model, f"precision={settings.precision}"],
                rows=settings.rows,
                row_tokens=settings.row_tokens,
                steps=settings.steps,
                warmup=settings.warmup,
            )
            rounds = run_rounds(settings, Path(name))
    except ValueError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return BAD_CONFIG
    except ChildProcessError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return INTERNAL
    row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "parameters": sum(p.numel() for _, p in unique_parameters(run.plan_model())),
        "machine": _machine(),
        "packages": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        **summarise(
            rounds,
            tokens=settings.rows * settings.row_tokens,
            warmup=settings.warmup,
            precision=settings.precision,
        ),
    }
    print(report(row))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
