"""What activation checkpointing costs and saves: one step of a Llama of 40 M parameters, by mode.

    python -m benchmarks.recomputing                 eager blocks
    python -m benchmarks.recomputing compile=true    compiled ones

All modes in one process, a step of each in turn. Memory: the peak of tensor bytes in a step, above
the weights and the optimizer's state that are there before it.
"""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.in_turn import append_row, machine, read_texts
from benchmarks.plan_memory.measure import peak_of
from benchmarks.roofline.cases import CASES
from launch.exit_codes import BAD_CONFIG, FINISHED
from launch.host_memory import keep_few_kernels, keep_freed_memory
from trainer.mesh import Mesh
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.planning.rows import full_batches
from trainer.run import Run

RESULTS = Path(__file__).resolve().parent / "results" / "recomputing.jsonl"
OPTIONS = {"compile": "false", "rounds": "3", "budgets": "0.2,0.4,0.7"}


def main(words: list[str]) -> int:
    """Measure, print a table, and append a row to results/recomputing.jsonl."""
    try:
        options = read_texts(words, dict(OPTIONS))
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    keep_freed_memory("cpu", os.environ)
    keep_few_kernels("cpu", os.environ)
    modes = {mode: ActivationCheckpointing(mode=mode) for mode in ("none", "selective", "full")}
    for budget in map(float, options["budgets"].split(",")):
        modes[f"budget={budget}"] = ActivationCheckpointing(mode="budget", budget=budget)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(modes, Path(folder), options)
    print("\n".join(lines(found)))
    append_row(RESULTS, {"options": options, "machine": machine(), "modes": found})
    return FINISHED


def measure(
    modes: dict[str, ActivationCheckpointing], folder: Path, options: dict[str, str]
) -> dict[str, Any]:
    """Return losses, bytes and seconds of each mode."""
    torch._dynamo.config.recompile_limit = 8 * len(modes)  # a graph for each, of the same code
    steps: dict[str, _Steps] = {}
    found: dict[str, Any] = {}
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())  # no one to speak to
    for name, recompute in modes.items():
        run = CASES["llama pretrain"].run(folder, 1, precision="bf16")
        engine: Any = replace(
            run.engine, activation_checkpointing=recompute, compile=options["compile"] == "true"
        )  # type: ignore[type-var]
        steps[name] = step = _Steps(replace(run, engine=engine))
        losses = [step()]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            losses.append(step())
        found[name] = {"losses": losses, "peak": peak_of(profiled), "seconds": []}
        print(name, found[name], file=sys.stderr, flush=True)
    for _ in range(int(options["rounds"])):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name]["seconds"].append(time.perf_counter() - start)
    dist.destroy_process_group()
    return found


class _Steps:
    """A model with its optimizer, and one batch that it trains on at each call."""

    def __init__(self, run: Run) -> None:
        device = torch.device("cpu")
        mesh, model = Mesh("cpu", run.chosen_mesh(1)[0].axes(1)), run.trained_model()
        laid_out = run.engine.lay_out(model, run.surroundings(model, mesh, device))
        generator = torch.Generator().manual_seed(0)
        laid_out.fill(
            device, lambda _, start, stop: 0.02 * torch.randn(stop - start, generator=generator)
        )
        self.engine = run.engine.build(laid_out, run.surroundings(laid_out.parts[0], mesh, device))
        self.batches, self.step = full_batches(run, 1, is_pipeline=False), 0

    def __call__(self) -> float:
        self.step += 1
        num_tokens = sum(batch.input_ids.numel() for batch in self.batches)
        result = self.engine.train_step(self.step, self.batches, num_tokens)
        return float(result.loss_sum / result.num_targets)


def lines(found: dict[str, Any]) -> list[str]:
    """Return a table: each mode beside none, of the same round."""
    table = [
        "| mode | step, s | by none | peak above state, MiB | by none |",
        "|---|---|---|---|---|",
    ]
    none = found["none"]
    for name, row in found.items():
        ratios = [one / base for one, base in zip(row["seconds"], none["seconds"], strict=True)]
        table.append(
            f"| {name} | {median(row['seconds']):.2f} | {median(ratios):.2f} [{min(ratios):.2f} - "
            f"{max(ratios):.2f}] | {row['peak'] / 2**20:.0f} | {row['peak'] / none['peak']:.2f} |"
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
