"""What do logging, evaluation and checkpoints cost together at the default intervals?

    python -m benchmarks.overheads [only=demo,llama_16m]

One short run of each workload, by the function that `tessera train` ends in, with its console, its
ledger and background saves; it logs, evaluates and saves more often than by default, and a clock
notes each change of phase. From the median of each event and the default intervals (log_every 10,
eval_every and save_every 500) follows the share of a long run's wall time. What is assumed: the
background part of a save costs all of its time, though another core may do it; single process.
Evaluations read what the default `eval_share` comes to of the held-out 1 % of the standard library
(82,000 tokens in bytes): 64 rows of 256 with `demo`, which has the demo's model and batch (1,024
tokens a step), all 160 of 512 with `llama_16m`, which has the default batch (16 rows) in bf16.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import commands
from benchmarks.figure import Figure
from benchmarks.in_turn import chosen, spread
from benchmarks.starts import start_in
from launch.binding import bind
from launch.compose import compose
from launch.terminal import configure_logging
from trainer.callbacks.protocol import Callback
from trainer.construct import fit
from trainer.progress import Progress
from trainer.protocols import Saved
from trainer.run import Run
from trainer.whereabouts import Whereabouts

RESULTS = Path(__file__).parent / "results" / "overheads.jsonl"
WORKLOADS = {
    "demo": ("experiment=demo", "callbacks.ngrams=null", "max_steps=48"),
    "llama_16m": ("model=llama_16m", "data=text", "data.path=stdlib", "tokenizer=byte",
                  "max_steps=8"),
}  # fmt: skip
DEFAULTS = {"only": ",".join(WORKLOADS)}
LIMIT = 2.0  # % of the wall time
STEP = ("data", "train_step", "control")
WRITTEN = "written"
EVERY = {"log": "log_every", "evaluate": "eval_every", "save": "save_every", WRITTEN: "save_every"}
Spans = Mapping[str, Sequence[float]]
"""Seconds of each event of a phase."""


class Clock(Whereabouts):
    """Notes how long each phase of a run took."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: dict[str, list[float]] = defaultdict(list)
        self.since = time.perf_counter()

    def enter(self, phase: str, *place: Any, **more: Any) -> None:
        now = time.perf_counter()
        self.spans[self.place["phase"]].append(now - self.since)
        self.since = now
        super().enter(phase, *place, **more)


@dataclass(frozen=True, kw_only=True)
class WriterSpec:
    """Makes the callback that notes the background part of saves."""

    written: list[float] = field(default_factory=list)

    def build(self) -> Callback:
        return _Writer(self.written)


class _Writer(Callback):
    def __init__(self, written: list[float]) -> None:
        self.written = written

    def on_save(self, progress: Progress, saved: Saved) -> None:
        self.written.append(saved.seconds_written)


def figures(options: dict[str, str] = DEFAULTS) -> list[Figure]:
    """Run each chosen workload once."""
    workloads = chosen(options["only"], WORKLOADS)
    return [figure_of(name, *measure(words)) for name, words in workloads.items()]


def measure(words: Sequence[str]) -> tuple[Spans, dict[str, int]]:
    """Return the seconds of all events of a short run, and the default intervals."""
    root = compose([]).tree
    intervals = {phase: root[key] for phase, key in EVERY.items()}
    tree = compose(list(words)).tree
    tree.pop("launch")
    num_steps = tree["max_steps"]
    tree |= {"log_every": 1, "save_every": num_steps // 4, "eval_every": num_steps // 2}
    # As many held-out rows as by default, though evaluations come more often.
    tree["eval_share"] = root["eval_share"] * root["eval_every"] / tree["eval_every"]
    writer = WriterSpec()
    with tempfile.TemporaryDirectory() as folder:
        tree |= {"name": "run", "runs": folder}
        tree["data"]["cache"] = f"{folder}/cache"
        run: Run = bind(tree)
        run = replace(run, callbacks={**run.callbacks, "closing": None, "writer": writer})
        clock = Clock()
        fit(run, replace(start_in(Path(folder) / "run"), whereabouts=clock))
    return {**clock.spans, WRITTEN: writer.written}, intervals


def figure_of(name: str, spans: Spans, intervals: Mapping[str, int]) -> Figure:
    """Return the share of all events in percent of the wall time."""
    step = sum(median(spans[phase][1:]) for phase in STEP)  # the first one fills caches
    shares = {p: share(step, {p: median(spans[p])}, intervals) for p in intervals}
    parts = ", ".join(f"{phase} {value:.2f}" for phase, value in shares.items())
    costs = {phase: median(spans[phase]) for phase in intervals}
    costliest = {phase: max(spans[phase]) for phase in intervals}
    cheapest = {phase: min(spans[phase]) for phase in intervals}
    found = [share(step, each, intervals) for each in (costs, cheapest, costliest)]
    return Figure(
        name=f"{name}: logs, evaluations, saves, % of the time of a run with steps of {step:.3f} s "
        f"({parts})",
        ours=spread(found), theirs=None, target="< 2 %", limit=LIMIT, value=found[0], is_upper=True,
    )  # fmt: skip


def share(step: float, costs: Mapping[str, float], intervals: Mapping[str, int]) -> float:
    """Return what events of `costs` seconds, once in so many steps each, take of a run's time in
    percent; `step` is the seconds of a step without them."""
    extra = sum(cost / intervals[phase] for phase, cost in costs.items())
    return 100 * extra / (step + extra)


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/overheads.jsonl; return the exit code."""
    configure_logging(rank=0)
    return commands.run(__doc__, words, DEFAULTS, figures, RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
