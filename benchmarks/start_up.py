"""How long does a start take, up to the first loss on the screen?

    python -m benchmarks.start_up [rounds=3] [only=demo,llama]

`demo` is `tessera train experiment=demo`, `llama` the Llama of 40 M parameters of train_step in
bf16. Each round starts them in turn, each in a new process: with empty caches (demo), again, and
with `engine.compile=true` after one such start has filled the cache. A ratio is taken within a
round. Files of Python and torch are in the machine's page cache: a first start after boot reads
them from disk. Times are from the start of the process, as a person has them.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.commands import DEMO, FIRST_LOSS, LLAMA_40M, QUIET, run, tessera
from benchmarks.figure import Figure
from benchmarks.in_turn import Spread, chosen, spread

RESULTS = Path(__file__).parent / "results" / "start_up.jsonl"
DEFAULTS = {"rounds": "3", "only": "demo,llama"}
WORKLOADS = {"demo": DEMO, "llama": (*LLAMA_40M, "precision=bf16")}
HELP, FRESH, EAGER, COMPILED = "help", "fresh", "eager", "compiled"
Times = dict[str, list[float]]
"""Seconds of each kind of start, round by round."""


def figures(options: dict[str, str] = DEFAULTS) -> list[Figure]:
    """Measure all starts of the chosen workloads in turn."""
    found = []
    for name, words in chosen(options["only"], WORKLOADS).items():
        times = measure(words, int(options["rounds"]), is_whole=name == "demo")
        found += figures_of(name, times)
    return found


def measure(words: tuple[str, ...], rounds: int, *, is_whole: bool) -> Times:
    """Return the seconds of each kind of start; `is_whole`: with empty caches, and the help too."""
    times: Times = {EAGER: [], COMPILED: []}
    with tempfile.TemporaryDirectory() as name:
        warm = Path(name) / "warm"
        words = ("train", *words, *QUIET, "max_steps=1", f"runs={name}/runs")
        compiled = (*words, "engine.compile=true")
        cold = tessera(compiled, warm, FIRST_LOSS)
        print(f"with an empty compile cache: {cold:.1f} s", file=sys.stderr)
        for number in range(rounds):
            if is_whole:
                times.setdefault(HELP, []).append(tessera(["--help"], warm))
                home = Path(name) / f"home-{number}"
                times.setdefault(FRESH, []).append(tessera(words, home, FIRST_LOSS))
            times[EAGER].append(tessera(words, warm, FIRST_LOSS))
            times[COMPILED].append(tessera(compiled, warm, FIRST_LOSS))
    return times


def figures_of(name: str, times: Times) -> list[Figure]:
    """Return the figures of one workload."""
    limits = {
        HELP: (0.5, "tessera --help, s"),
        FRESH: (8.0, "demo with empty caches: s to the first loss"),
        EAGER: (8.0, f"{name}, second start: s to the first loss"),
    }
    found = []
    for kind, (limit, what) in limits.items():
        if kind in times and (kind != EAGER or name == "demo"):
            found.append(_within(what, limit, spread(times[kind])))
    pairs = zip(times[COMPILED], times[EAGER], strict=True)
    ratio = spread([compiled / eager for compiled, eager in pairs])
    return [
        *found,
        Figure(
            name=f"{name}, compiled with a warm cache beside eager: s to the first loss",
            ours=spread(times[COMPILED]), theirs=spread(times[EAGER]), target="ratio <= 1.3",
            limit=1.3, value=ratio["median"], is_upper=True,
        ),
    ]  # fmt: skip


def _within(name: str, limit: float, seconds: Spread) -> Figure:
    return Figure(
        name=name, ours=seconds, theirs=None, target=f"<= {limit:g} s", limit=limit,
        value=seconds["median"], is_upper=True,
    )  # fmt: skip


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/start_up.jsonl; return the exit code."""
    return run(__doc__, words, DEFAULTS, figures, RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
