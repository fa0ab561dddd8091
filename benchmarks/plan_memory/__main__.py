"""Memory as `tessera plan` says it, beside the peak of tensor bytes of the same run.

    python -m benchmarks.plan_memory                 all runs, and the table of docs/plan.md
    python -m benchmarks.plan_memory only=fsdp       those whose names contain a text
    python -m benchmarks.plan_memory measure=false   plans alone, beside what was measured before

Two steps of each run on this machine's CPU; the rank that held most counts.
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.plan_memory.cases import CASES
from benchmarks.plan_memory.measure import measured
from trainer.engines.deepspeed_state import import_deepspeed

RESULTS = Path(__file__).resolve().parents[1] / "results" / "plan_memory.jsonl"


def main(words: list[str]) -> int:
    options = {"only": "", "measure": "true"} | dict(word.split("=", 1) for word in words)
    import_deepspeed("cpu")  # once, not in every rank
    cases = [case for name, case in CASES.items() if options["only"] in name]
    with tempfile.TemporaryDirectory() as folder:
        if options["measure"] == "true":
            for case in cases:
                held = measured(case, Path(folder))
                most = max(held, key=lambda one: one.tensor_bytes)
                row = {
                    "case": case.name,
                    "ranks": case.processes,
                    "words": list(case.words),
                    "tensor_bytes": most.tensor_bytes,
                    "rss_bytes": most.rss_bytes,
                }
                print(row, flush=True)
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
