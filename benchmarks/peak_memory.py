"""The most memory that a run holds, beside the Hugging Face Trainer's, in every family and task.

    python -m benchmarks.peak_memory                      all cases, each side in turn
    python -m benchmarks.peak_memory only="llama lora,gemma lora" steps=8 rounds=2

The cases are those of benchmarks/roofline: models of 40 M parameters in bf16. Both sides start from
the same weight file, and see what our loader hands out, 8 rows or texts in a forward pass:

- whole rows of 512 tokens; of short ones (captions) theirs are cut to the longest of 8;
- their classifier gets its documents one by one, padded to the longest: packed ones it cannot tell
  apart.

Each side trains as its users would, in a fresh process: the Trainer with bf16=True and its own
optimizer and schedule, adapters by peft on a base that is loaded in bf16. What counts is the
high-water mark of its resident memory up to the last step, imports included; what it held before
step 1 and the median step without the first two come along. That both sides do the same work shows
in the loss of step 1, which must be the same to 2 %: in packed rows of documents the Trainer lets
texts see the ones before them. transformers has no classifier of Idefics' kind, nor do we.
"""

import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import commands
from benchmarks.figure import Figure
from benchmarks.in_turn import chosen, run_rounds, spread
from benchmarks.peak_memory_sides import CASE, FOLDER, SIDES, prepare
from benchmarks.roofline.cases import CASES

RESULTS = Path(__file__).parent / "results" / "peak_memory.jsonl"
DEFAULTS = {"only": ",".join(CASES), "steps": "6", "rounds": "1", "threads": "2"}
WARMUP = 2
SAME_LOSS = 0.02  # relative; of step 1
Curves = list[dict[str, Any]]
"""What one side left in each round."""


def figures(options: dict[str, str] = DEFAULTS) -> list[Figure]:
    """Measure the chosen cases, both sides in turn; ChildProcessError where one fails."""
    cases = chosen(options["only"], CASES)
    if not options["steps"].isdecimal() or int(options["steps"]) <= WARMUP + 1:
        raise ValueError(f"steps={options['steps']} is too few; set it to {WARMUP + 2} or more")
    return [measure(name, options) for name in cases]


def measure(name: str, options: dict[str, str]) -> Figure:
    """Run both sides of one case in turn, as often as there are rounds."""
    with tempfile.TemporaryDirectory() as folder:
        print(name, file=sys.stderr)
        inputs = Path(folder)
        (inputs / FOLDER).mkdir()
        (inputs / CASE).write_text(json.dumps({"name": name, "steps": int(options["steps"])}))
        prepare(inputs)
        rounds = run_rounds(
            "benchmarks.peak_memory_sides", SIDES, inputs,
            rounds=int(options["rounds"]), threads=int(options["threads"]),
        )  # fmt: skip
    return figure_of(name, *([one[side] for one in rounds] for side in SIDES))


def figure_of(name: str, ours: Curves, theirs: Curves) -> Figure:
    """Return the peak of a case; ValueError where both sides did not do the same work."""
    losses = [curves[0]["losses"][0] for curves in (ours, theirs)]
    if abs(losses[0] - losses[1]) > SAME_LOSS * losses[1]:
        raise ValueError(
            f"{name}: the loss of step 1 is {losses[0]:.4f} of ours and {losses[1]:.4f} of theirs, "
            f"more than {SAME_LOSS:.0%} apart; they do not do the same work"
        )
    held = [median(curve["held_gib"] for curve in curves) for curves in (ours, theirs)]
    steps = [median(map(median_step, curves)) for curves in (ours, theirs)]
    peaks = [spread([curve["peak_gib"] for curve in curves]) for curves in (ours, theirs)]
    return Figure(
        name=f"{name}: peak memory beside the Trainer, GiB "
        f"(before step 1: {held[0]:.2f} and {held[1]:.2f}; "
        f"a step: {steps[0]:.2f} and {steps[1]:.2f} s; "
        f"loss of step 1: {losses[0]:.4f} and {losses[1]:.4f})",
        ours=peaks[0], theirs=peaks[1], target="ratio < 1", limit=1.0,
        value=peaks[0]["median"] / peaks[1]["median"], is_upper=True,
    )  # fmt: skip


def median_step(curve: dict[str, Any]) -> float:
    """Return the median seconds of a step behind the first two."""
    return median(stop - start for start, stop in pairwise(curve["stamps"][WARMUP - 1 :]))


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/peak_memory.jsonl; return the exit code."""
    return commands.run(__doc__, words, DEFAULTS, figures, RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
