"""Memory as `tessera plan` says it, beside the peak of tensor bytes of the same run.

    python -m benchmarks.plan_memory                 all runs, and the table of docs/plan.md
    python -m benchmarks.plan_memory only=fsdp       runs whose names contain a text
    python -m benchmarks.plan_memory measure=false   plans anew, beside what was measured before

Two steps of each run on this machine's CPU; of several ranks the one that held most counts.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.in_turn import read_texts
from benchmarks.plan_memory.cases import CASES, Case
from benchmarks.plan_memory.measure import measured
from benchmarks.plan_memory.page import write_table
from launch.exit_codes import BAD_CONFIG, CHECK_FAILED, FINISHED
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.planning.memory import memory_of
from trainer.run_data import data_of

RESULTS = Path(__file__).resolve().parents[1] / "results" / "plan_memory.jsonl"
LIMIT = 0.1  # of what was measured


def main(words: list[str]) -> int:
    """Measure, plan, write; return 1 where a plan is further off than LIMIT."""
    try:
        options = read_texts(words, {"only": "", "measure": "true"})
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    import_deepspeed("cpu")  # once, not in every rank
    rows = _recorded()
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES.values():
            if options["only"] in case.name:
                rows[case.name] = _row(case, Path(folder), rows.get(case.name), options["measure"])
                print(json.dumps(rows[case.name]), flush=True)
                lines = [json.dumps(rows[name]) + "\n" for name in CASES if name in rows]
                RESULTS.write_text("".join(lines))
    write_table([rows[name] for name in CASES if name in rows])
    is_off = any(abs(row["planned"] / row["tensor_bytes"] - 1) > LIMIT for row in rows.values())
    return CHECK_FAILED if is_off else FINISHED


def _recorded() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["case"]: row for row in map(json.loads, lines)}


def _row(case: Case, folder: Path, known: dict[str, Any] | None, measure: str) -> dict[str, Any]:
    """Return what was measured of a case, now or before, and what its plan says."""
    row = dict(known or {})
    if measure == "true" or not row:
        most = max(measured(case, folder), key=lambda held: held.tensor_bytes)
        row = {
            "case": case.name, "ranks": case.processes, "words": list(case.words),
            "tensor_bytes": most.tensor_bytes, "rss_bytes": most.rss_bytes,
        }  # fmt: skip
    run = case.run(folder)
    data_of(run)  # documents that were made are counted, as after any training
    memory = memory_of(run, case.processes, is_gpu=False)
    return row | {"planned": memory.peak, "phase": memory.phase, "parts": memory.by_category}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
