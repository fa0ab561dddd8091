"""Measures cases, each in a process of its own, and judges them by this machine's limits."""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.in_turn import append_row, machine
from benchmarks.roofline.ceilings import ceilings

RESULTS = Path(__file__).resolve().parents[1] / "results" / "roofline.jsonl"
OPTIONS = {"only": "", "precision": "bf16", "threads": "2", "compile": "false"}
OPTIMIZER_BYTES = 7 * 4
"""AdamW in fp32 reads weight, gradient and two means of each number, and writes three of them."""
CASE, SHARE = "llama pretrain", 0.6


def figures() -> list[Figure]:
    """Measure the Llama of 40 M, eager and compiled; append rows to results/roofline.jsonl."""
    found = []
    for compiled, mode in (("false", "eager"), ("true", "compiled")):
        row = measure([CASE], OPTIONS | {"compile": compiled})
        append_row(RESULTS, row)
        found.append(figure_of(row["cases"][CASE], mode))
    return found


def figure_of(case: dict[str, Any], mode: str) -> Figure:
    """Return which share of a step its own products take, one by one, in the same run."""
    shares = [case["product_seconds"] / seconds for seconds in case["step_seconds"]]
    share = case["product_seconds"] / case["seconds"]
    return Figure(
        name=f"Llama of 40 M, bf16, {mode}: rate of a step by that of its own products",
        ours={"median": share, "min": min(shares), "max": max(shares)}, theirs=None,
        target=f">= {SHARE}", limit=SHARE, value=share, is_upper=False,
    )  # fmt: skip


def measure(names: list[str], options: dict[str, str]) -> dict[str, Any]:
    """Take the steps `names` apart, each in a process of its own; return the result row."""
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
    return row


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
