"""Optimizers on one data set in turn: loss of the same tokens, seconds of a step and of its update.

    python -m benchmarks.optimizers                                  # four optimizers, demo model
    python -m benchmarks.optimizers sides=fp32,stochastic,nearest    # rounding of bf16 weights
    python -m benchmarks.optimizers steps=60 rows=8 experiment=pretrain_text model=llama_16m

Each side trains in this process for `turn` steps, then the next one does, until all have taken
`steps`: so what else runs on the machine slows all of them down alike.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.in_turn import append_row, chosen, machine, read_texts
from launch.binding import bind_run
from launch.compose import compose
from launch.exit_codes import BAD_CONFIG, FINISHED
from trainer.batch import Batch
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.run import Run

DEFAULTS = {
    "sides": "adamw,adamw_bf16,adamw8bit,muon", "steps": "200", "turn": "10", "lr": "3e-3",
    "experiment": "demo", "rows": "", "model": "",
}  # fmt: skip
SIDES = {
    "adamw": ["optim=adamw"],
    "adamw_bf16": ["optim=adamw_bf16"],
    "adamw8bit": ["optim=adamw8bit"],
    "muon": ["optim=muon"],
    "fp32": ["optim=adamw", "precision=bf16"],
    "stochastic": ["optim=adamw", "precision=pure_bf16"],
    "nearest": ["optim=adamw", "precision=pure_bf16", "optim.rounding=nearest"],
    "lean": ["optim=adamw8bit", "precision=pure_bf16"],
}
RESULTS = Path(__file__).parent / "results" / "optimizers.jsonl"
LAST = 20  # steps whose mean loss is said: one step's is noise


@dataclass(kw_only=True)
class Side:
    """One optimizer's run, a few steps at a time."""

    run: Run
    engine: Any
    steps: Iterator[Any]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)

    def take(self, count: int) -> None:
        for _ in range(count):
            batches: list[Batch]
            batches, num_tokens = next(self.steps)
            start = time.perf_counter()
            result = self.engine.train_step(len(self.losses) + 1, batches, num_tokens)
            self.losses.append(float(result.loss_sum / result.num_targets))
            self.seconds.append(time.perf_counter() - start)

    def row(self, name: str) -> dict[str, Any]:
        return {
            "side": name, "steps": len(self.losses),
            "loss": round(sum(self.losses[-LAST:]) / len(self.losses[-LAST:]), 4),
            "step_seconds": round(median(self.seconds), 4),
            "update_seconds": round(median(self.updates), 4),
            "state_bytes": sum(p.local.nbytes for p in self.engine.optimizer_state().values()),
        }  # fmt: skip


def side_of(words: list[str], ranks: Ranks) -> Side:
    """Return a side that has not begun."""
    run: Run = bind_run(compose(words).tree | {"name": "optimizers"})
    run.check(1)
    mesh = run.mesh.build(ranks=ranks)
    torch.manual_seed(run.seed)
    engine: Any = build_engine(run, run.trained_model(), ranks, mesh)
    vocabulary = run.model.vocab_size
    tokenizer = run.data.tokenizer(run.tokenizer_setting, vocabulary)
    loader, _ = run.data.build(tokenizer=tokenizer, seed=run.seed, rank=0, num_ranks=1)
    side = Side(run=run, engine=engine, steps=_steps(loader))
    _time_updates(engine.update.optimizer, side.updates)
    return side


def _steps(loader: Any) -> Iterator[tuple[list[Batch], int]]:
    number = 0
    while True:
        step = loader.step(number)
        yield step.micro_batches, step.num_tokens
        number += 1


def _time_updates(optimizer: Any, seconds: list[float]) -> None:
    plain = optimizer.step

    def step() -> None:
        start = time.perf_counter()
        plain()
        seconds.append(time.perf_counter() - start)

    optimizer.step = step


def main(words: list[str]) -> int:
    """Train all sides, print and store; return the exit code."""
    try:
        options = read_texts(words, DEFAULTS)
        own = chosen(options["sides"], SIDES, "sides")
    except ValueError as error:
        print(f"optimizers: {error}", file=sys.stderr)
        return BAD_CONFIG
    common = [f"experiment={options['experiment']}", f"max_steps={options['steps']}"]
    common += [f"optim.lr={options['lr']}"]
    common += [f"model={options['model']}"] if options["model"] else []
    common += [f"data.global_rows={options['rows']}"] if options["rows"] else []
    ranks = Ranks(Placement(), 600.0)
    sides = {name: side_of([*common, *more], ranks) for name, more in own.items()}
    total, turn = int(options["steps"]), int(options["turn"])
    for done in range(0, total, turn):
        for side in sides.values():
            side.take(min(turn, total - done))
        print(f"{done + turn} of {total} steps", file=sys.stderr, flush=True)
    rows = [side.row(name) for name, side in sides.items()]
    found = {"options": options, "machine": machine(), "rows": rows}
    for row in rows:
        print(json.dumps(row))
    append_row(RESULTS, found)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
