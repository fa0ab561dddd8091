"""Has something become slower? Ratios of ours to a plain way, measured now, beside stored ones.

    python -m benchmarks.regression                 prints each ratio beside the stored one
    python -m benchmarks.regression renew=true      stores today's in results/baseline.json

A slow test does the same: more than the stored ratio times its tolerance fails. Both sides of a
pair run in turn, many times, on one thread, and each pair gives one ratio of processor times: other
jobs on the machine slow both sides. Ratios hold for the kind of processor that they were found on.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import process_time

from benchmarks.in_turn import machine, read_texts
from benchmarks.regression_pairs import Pair, head, loader, step
from benchmarks.scaling import host
from launch.exit_codes import BAD_CONFIG, FINISHED
from trainer.files import read_json, write_json
from trainer.planning.apart import apart

BASELINE = Path(__file__).parent / "results" / "baseline.json"
ROUNDS, SAMPLE_SECONDS = 41, 0.08
RANKS, HOST_ROUNDS = 64, 4


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much longer ours takes than a plain way to do the same, and what is allowed."""

    value: float
    tolerance: float
    """`value` of a later run may be so many times this one."""


TOLERANCES = {"step": 1.15, "head": 1.15, "loader": 1.15, "host": 1.05}
"""Ours on a host is nearly all torch's: 5 % of it are twice our own Python."""


def measure() -> dict[str, float]:
    """Return all ratios, each measured in a process of its own."""
    found = {name: apart(_measured, name) for name in ("step", "head", "loader")}
    seconds = apart(host.measure, RANKS, HOST_ROUNDS)
    return found | {"host": median(map(_quotient, zip(seconds.ours, seconds.lean, strict=True)))}


def _quotient(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1]


def _measured(name: str) -> float:
    makers = {"step": step, "head": head, "loader": loader}
    with tempfile.TemporaryDirectory() as folder:
        return ratio(makers[name](Path(folder)))


def ratio(pair: Pair) -> float:
    """Return the median ratio of the processor times of both sides, in turn."""
    count = max(1, round(SAMPLE_SECONDS / _seconds(pair.theirs, 3) * 3))
    ratios = []
    for number in range(ROUNDS):
        sides = (pair.ours, pair.theirs) if number % 2 else (pair.theirs, pair.ours)
        seconds = {side: _seconds(side, count) for side in sides}
        ratios.append(seconds[pair.ours] / seconds[pair.theirs])
    return median(ratios)


def _seconds(work: Callable[[], object], count: int) -> float:
    start = process_time()
    for _ in range(count):
        work()
    return process_time() - start


def slower(found: dict[str, float], stored: dict[str, Ratio]) -> list[str]:
    """Return one line for each ratio that has grown beyond its tolerance."""
    return [
        f"{name}: {found[name]:.3f} times the plain way, {known.value:.3f} was stored and "
        f"{known.value * known.tolerance:.3f} is allowed; find out why, or store today's by "
        "python -m benchmarks.regression renew=true"
        for name, known in stored.items()
        if found[name] > known.value * known.tolerance
    ]


def stored() -> tuple[str, dict[str, Ratio]]:
    """Return the processor that the baseline was measured on, and its ratios."""
    tree = read_json(BASELINE)
    return tree["cpu"], {name: Ratio(**ratio) for name, ratio in tree["ratios"].items()}


def main(words: list[str]) -> int:
    """Measure and print; store with renew=true. Exit code 1: something has become slower."""
    try:
        renew = read_texts(words, {"renew": "false"})["renew"]
        if renew not in ("true", "false"):
            raise ValueError(f"renew={renew} is unknown; set it to true or false")
    except ValueError as error:
        print(f"regression: {error}", file=sys.stderr)
        return BAD_CONFIG
    found, cpu = measure(), machine()["cpu"]
    if renew == "true":
        ratios = {
            name: asdict(Ratio(value=round(value, 4), tolerance=TOLERANCES[name]))
            for name, value in found.items()
        }
        write_json(BASELINE, {"cpu": cpu, "ratios": ratios})
    where, known = stored()
    for name, value in found.items():
        print(f"{name:<8}{value:>8.3f}   stored {known[name].value:.3f} on {where}")
    lines = slower(found, known) if where == cpu else []
    print("\n".join(lines))
    return int(bool(lines)) or FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
