"""What does `deterministic=run` cost a step?

    python -m benchmarks.determinism [rounds=3] [only=demo,demo2,llama,llama2]

`demo` is `experiment=demo` in fp32, `llama` the Llama of 40 M parameters of train_step in bf16;
with a 2 behind it on two processes with DDP. Each round runs a workload with `deterministic=off`
and `run` in turn, each in a new process that logs each step; a side's figure is the median step.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.commands import DEMO, LLAMA_40M, QUIET, median_step, run, tessera
from benchmarks.figure import Figure
from benchmarks.in_turn import chosen, spread

RESULTS = Path(__file__).parent / "results" / "determinism.jsonl"
_DEMO = (*DEMO, "max_steps=40")
_LLAMA = (*LLAMA_40M, "precision=bf16", "max_steps=7", "callbacks.closing=null")
WORKLOADS = {
    "demo": _DEMO,
    "demo2": (*_DEMO, "launch.processes=2", "data.micro_rows=2"),
    "llama": _LLAMA,
    "llama2": (*_LLAMA, "launch.processes=2"),
}
DEFAULTS = {"rounds": "3", "only": ",".join(WORKLOADS)}
WARMUP = 2  # steps


def figures(options: dict[str, str] = DEFAULTS) -> list[Figure]:
    """Measure both sides of the chosen workloads in turn."""
    rounds, workloads = int(options["rounds"]), chosen(options["only"], WORKLOADS)
    return [figure_of(name, *measure(words, rounds)) for name, words in workloads.items()]


def measure(words: tuple[str, ...], rounds: int) -> tuple[list[float], list[float]]:
    """Return the median step of each round in seconds, with `run` and with `off`."""
    seconds: dict[str, list[float]] = {"off": [], "run": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for mode, found in seconds.items():
                name = f"{mode}-{number}"
                own = ("log_every=1", f"runs={folder}", f"name={name}", f"deterministic={mode}")
                tessera(("train", *words, *QUIET, *own), Path(folder) / "home")
                found.append(median_step(Path(folder) / name, WARMUP))
    return seconds["run"], seconds["off"]


def figure_of(name: str, run: list[float], off: list[float]) -> Figure:
    """Return what `run` costs above `off`, in percent of a step."""
    costs = spread([100 * (ours / theirs - 1) for ours, theirs in zip(run, off, strict=True)])
    return Figure(
        name=f"{name}: deterministic=run beside off, s per step", ours=spread(run),
        theirs=spread(off), target="costs < 10 %", limit=10.0, value=costs["median"],
        is_upper=True,
    )  # fmt: skip


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/determinism.jsonl; return the exit code."""
    return run(__doc__, words, DEFAULTS, figures, RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
