"""What a step costs, what it would cost at this machine's limits, and where the difference goes.

    python -m benchmarks.roofline                    all cases, as two tables
    python -m benchmarks.roofline only=llama compile=true threads=1 precision=fp32

Each case runs in a process of its own, with the engine and loop of `tessera train`: nine steps as
they are, interleaved with the step's own products one by one; one step whose operations are
counted; two under torch's profiler. The floor is what products cost at the rate of a square product
and what the optimizer moves at the rate of memory; it leaves out all else that a step must do.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.in_turn import machine, read_texts
from benchmarks.roofline.cases import CASES
from benchmarks.roofline.ceilings import ceilings
from benchmarks.roofline.tables import lines
from launch.exit_codes import BAD_CONFIG, FINISHED

RESULTS = Path(__file__).resolve().parents[1] / "results" / "roofline.jsonl"
OPTIONS = {"only": "", "precision": "bf16", "threads": "2", "compile": "false"}
OPTIMIZER_BYTES = 7 * 4
"""AdamW in fp32 reads weight, gradient and two means of each number, and writes three of them."""


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/roofline.jsonl; return the exit code."""
    try:
        options = read_texts(words, dict(OPTIONS))
        names = [name for name in CASES if options["only"] in name]
        if not names:
            raise ValueError(f"only={options['only']} is none of {', '.join(CASES)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    limits = {threads: ceilings(threads) for threads in (1, int(options["threads"]))}
    limit = limits[int(options["threads"])]
    row: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options,
        "machine": machine(),
        "ceilings": limits,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(name, file=sys.stderr, flush=True)
            row["cases"][name] = judged(
                _measured(name, Path(folder), options), limit, options["precision"]
            )
    print("\n".join(lines(row)))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return FINISHED


def judged(found: dict[str, Any], limit: dict[str, float], precision: str) -> dict[str, Any]:
    """Add the floor: products at the machine's rate, and the optimizer's bytes at memory's."""
    rate = limit["fp32" if precision == "fp32" else "bf16"]
    floor = found["flops"] / rate + found["trained"] * OPTIMIZER_BYTES / limit["memory"]
    return found | {"floor": floor}


def _measured(name: str, folder: Path, options: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = (options["threads"], options["precision"], options["compile"])
        words = ["-m", "benchmarks.roofline.measure", name, str(folder), output, *settings]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        if done.returncode:
            raise ChildProcessError(f"{name}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads((Path(output) / "found.json").read_text())
        return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
