"""Every layout and engine beside one process: deviation, messages, step time, memory.

    python -m benchmarks.layouts                  all of it, and the tables of docs/parallelism.md
    python -m benchmarks.layouts rounds=1 only=costs

Deviations are those of `tessera verify experiment=demo`, messages `benchmarks.collectives` counts.
Costs: the demo's model (3 M parameters, fp32), 8 rows x 256 tokens a step in micro-batches of 2. In
each round all variants run in turn, each in fresh processes; a variant's figure is the median step
of a round, then the median over rounds; its ratio to the plain step is taken within each round. All
ranks share this machine's cores, so work that is only shared out stays near 1.0: the rest of a
ratio is what messages and repeated work cost. Memory is rank 0's peak above what it held before the
model.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from benchmarks.collectives import small_demo, table
from benchmarks.layouts.cost import PLAIN, VARIANTS, Cost, base_run, measure
from benchmarks.layouts.pages import costs, deviations, replace_table
from launch.exit_codes import BAD_CONFIG, CHECK_FAILED, FINISHED
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.environment import environment
from trainer.verify.layouts import chosen
from trainer.verify.verify import Verdict, verify

RESULTS = Path(__file__).resolve().parents[1] / "results" / "layouts.jsonl"
PARTS = ("deviations", "messages", "costs")


def main(words: list[str]) -> int:
    options = {"rounds": "3", "only": ""}
    for word in words:
        key, _, value = word.partition("=")
        if key not in options:
            print(f"{key} is unknown; set rounds= or only=", file=sys.stderr)
            return BAD_CONFIG
        options[key] = value
    if options["only"] not in ("", *PARTS) or not options["rounds"].isdecimal():
        print(f"set only= to one of {', '.join(PARTS)}, rounds= to a number", file=sys.stderr)
        return BAD_CONFIG
    parts = (options["only"],) if options["only"] else PARTS
    import_deepspeed("cpu")  # once, not in every rank
    code = FINISHED
    if "deviations" in parts:
        code = _deviations()
    if "messages" in parts:
        replace_table("messages", table())
    if "costs" in parts:
        _costs(int(options["rounds"]))
    return code


def _deviations() -> int:
    def show(verdict: Verdict) -> None:
        print(f"{verdict.layout.name}: {'fits' if verdict.passes else 'DIFFERS'}", flush=True)

    verdicts = verify(small_demo(), chosen([]), on_verdict=show)
    replace_table("deviations", deviations([v for v in verdicts if v.checks]))
    return FINISHED if all(verdict.passes for verdict in verdicts) else CHECK_FAILED


def _costs(rounds: int) -> None:
    """Measure in interleaved rounds, print, record, and write the table."""
    found: dict[str, list[Cost]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name, variant in VARIANTS.items():
            found[name].append(measure(variant))
            print(f"round {number + 1}: {name} {found[name][-1]}", flush=True)
    rows = [_row(name, of_rounds, found[PLAIN]) for name, of_rounds in found.items()]
    facts = environment(1)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "parameters": sum(p.numel() for p in base_run().plan_model().parameters()),
        "machine": {key: facts[key] for key in ("cpus", "platform", "python", "git_commit")},
        "torch": torch.__version__,
        "rows": rows,
    }
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    replace_table("costs", costs(rows))


def _row(name: str, of_rounds: list[Cost], plain: list[Cost]) -> dict[str, object]:
    ratios = [one.seconds / base.seconds for one, base in zip(of_rounds, plain, strict=True)]
    return {
        "variant": name,
        "ranks": VARIANTS[name].layout.processes,
        "step_ms": round(1000 * median(one.seconds for one in of_rounds), 2),
        "ratio": round(median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "mib": round(median(one.mib for one in of_rounds), 1),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
