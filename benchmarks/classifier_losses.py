"""Does a classifier train by the same numbers as under transformers.Trainer, on every layout?

    python -m benchmarks.classifier_losses model=FOLDER data=FILE.jsonl [key=value ...]

Keys: the fields of Settings (classifier_inputs.py). Both sides start from one folder with a new
head and train the same texts in the same steps, in fp32, with the same AdamW; ours by `tessera
train experiment=sequence_classification` from the command line, packed. Three layouts each: one
process with one micro-batch, one process with four, two processes. Exit code 1 where our losses
differ from the Trainer's of the first layout, or between our layouts, by more than LIMIT.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.classifier_inputs import Settings, prepare
from benchmarks.in_turn import machine
from launch.exit_codes import BAD_CONFIG, CHECK_FAILED, FINISHED
from trainer.files import read_lines

Curve = list[dict[str, float]]
LIMIT = 1e-5
LAYOUTS = {"1 process, 1 micro-batch": (1, 1), "1 process, 4": (1, 4), "2 processes, 1": (2, 1)}
RESULTS = Path(__file__).parent / "results" / "classifier_losses.jsonl"


def ours(overrides: list[str], settings: Settings, ranks: int, accumulation: int) -> Curve:
    """Train by the command line; return what metrics.jsonl says of each step."""
    runs = Path(overrides[-1].partition("=")[2])
    name = f"ours-{ranks}-{accumulation}"
    rows = settings.global_documents // ranks // accumulation
    command = [
        sys.executable, "-m", "launch", "train", *overrides, f"name={name}",
        f"launch.processes={ranks}", f"data.micro_rows={rows}",
    ]  # fmt: skip
    _run(command)
    return [line for line in read_lines(runs / name / "metrics.jsonl") if line["split"] == "train"]


def theirs(inputs: Path, ranks: int, accumulation: int) -> Curve:
    """Train by the Trainer, under torchrun where there are several ranks."""
    output = inputs / f"trainer-{ranks}-{accumulation}"
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = ["-m", "benchmarks.classifier_trainer", str(inputs), str(output), str(accumulation)]
    _run([sys.executable, *start, *words])
    curve: Curve = json.loads((output / "curve.json").read_text())
    return curve


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def largest(one: Curve, other: Curve, key: str) -> float:
    """Return the largest difference of `key` over the steps, relative where it is above 1."""
    pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def compare(settings: Settings) -> dict[str, Any]:
    """Train all of them; return the curves by side and layout."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch)
        overrides = prepare(inputs, settings)
        curves: dict[str, Any] = {"ours": {}, "Trainer": {}}
        for name, (ranks, accumulation) in LAYOUTS.items():
            curves["ours"][name] = ours(overrides, settings, ranks, accumulation)
            curves["Trainer"][name] = theirs(inputs, ranks, accumulation)
    return curves


def _report(curves: dict[str, dict[str, Curve]]) -> list[dict[str, Any]]:
    """Print one line per side and layout; return them with all steps."""
    truth = curves["Trainer"]["1 process, 1 micro-batch"]
    print("side     layout                    first loss  first norm  from Trainer's first layout")
    rows = []
    for side, layouts in curves.items():
        for layout, curve in layouts.items():
            gap, norms = largest(curve, truth, "loss"), largest(curve, truth, "grad_norm")
            first = f"{curve[0]['loss']:10.6f}  {curve[0]['grad_norm']:10.5f}"
            print(f"{side:8} {layout:25} {first}  losses {gap:.1e}, norms {norms:.1e}")
            rows.append({
                "side": side, "layout": layout, "loss_gap": gap, "norm_gap": norms,
                "losses": [round(step["loss"], 7) for step in curve],
                "grad_norms": [round(step["grad_norm"], 5) for step in curve],
            })  # fmt: skip
    return rows


def main(words: list[str]) -> int:
    """Print one line per side and layout, and add a row to the results."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Settings)}
    try:
        given = dict(word.split("=", 1) for word in words)
        settings = Settings(**{key: kinds[key](value) for key, value in given.items()})
    except (KeyError, TypeError, ValueError) as error:
        print(f"{error}: keys are {', '.join(kinds)}, as key=value", file=sys.stderr)
        return BAD_CONFIG
    curves = compare(settings)
    rows = _report(curves)
    worst = max(row["loss_gap"] for row in rows if row["side"] == "ours")
    result = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"model": Path(settings.model).name,
                                        "data": Path(settings.data).name},
        "machine": machine(), "torch": version("torch"), "transformers": version("transformers"),
        "limit": LIMIT, "rows": rows,
    }  # fmt: skip
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"largest difference of our losses: {worst:.1e}, limit {LIMIT:g}")
    return FINISHED if worst <= LIMIT else CHECK_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
