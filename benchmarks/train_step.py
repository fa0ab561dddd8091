"""How fast is our training step beside the Hugging Face Trainer's, and is it the same step?

    python -m benchmarks.train_step [key=value ...]
    python -m benchmarks.train_step precision=bf16 model=smollm2_135m rows=2 steps=12 rounds=2
    python -m benchmarks.train_step compile=both

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

import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.in_turn import append_row, check_positive, machine, read_options, run_rounds
from benchmarks.train_step_inputs import prepare
from benchmarks.train_step_report import METHODS, report, summarise
from benchmarks.train_step_sides import SIDES, Curve
from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL
from trainer.parallel.pieces import unique_parameters

CONTENDERS = {
    "off": ("ours", "theirs"),
    "on": ("ours_compiled", "theirs_compiled"),
    "both": tuple(SIDES),
}
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
    compile: str = "off"
    """Whether blocks (ours) and model (theirs) are compiled: off, on or both."""
    rounds: int = 5
    threads: int = 2

    def __post_init__(self) -> None:
        check_positive(self)
        if self.row_tokens < 3:
            raise ValueError(f"row_tokens={self.row_tokens} has no room for text; set 3 or more")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} leaves nothing of steps={self.steps} to time")
        if self.precision not in METHODS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; set it to one of {', '.join(METHODS)}"
            )
        if self.compile not in CONTENDERS:
            raise ValueError(f"compile={self.compile!r} is unknown; set it to off, on or both")


def parse(words: list[str]) -> Settings:
    """Read key=value words; ValueError names the nearest key."""
    return Settings(**read_options(words, fields(Settings)))


def main(words: list[str]) -> int:
    """Compare, print, and append a row to results/train_step.jsonl; return the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return FINISHED
    try:
        row = measure(parse(words))
    except ChildProcessError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return INTERNAL
    except ValueError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return BAD_CONFIG
    print(report(row))
    append_row(RESULTS, row)
    return FINISHED


def measure(settings: Settings) -> dict[str, Any]:
    """Run all contenders in turn; return the result row."""
    with tempfile.TemporaryDirectory() as name:
        run = prepare(
            Path(name),
            overrides=[*settings.model, f"precision={settings.precision}"],
            rows=settings.rows,
            row_tokens=settings.row_tokens,
            steps=settings.steps,
            warmup=settings.warmup,
        )
        rounds = run_rounds(
            "benchmarks.train_step_sides", CONTENDERS[settings.compile], Path(name),
            rounds=settings.rounds, threads=settings.threads,
        )  # fmt: skip
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "parameters": sum(p.numel() for _, p in unique_parameters(run.plan_model())),
        "machine": machine(),
        "packages": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        **summarise(
            [{side: Curve(**curve) for side, curve in one.items()} for one in rounds],
            tokens=settings.rows * settings.row_tokens,
            warmup=settings.warmup,
            precision=settings.precision,
        ),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
