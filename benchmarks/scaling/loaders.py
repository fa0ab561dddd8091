"""What the data costs a rank, from 1e6 samples to 1e12 and from 2 ranks to 512.

Corpora are virtual, see `benchmarks.loader`: rows of 5 tokens in 1,000 files, or in one. Every rank
has 8 rows of each step. Seconds are processor time of one process, all corpora in turn in each
round, from the page cache: no disk is measured.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

from benchmarks.figure import Figure
from benchmarks.in_turn import spread
from benchmarks.loader import open_loader, write_virtual
from trainer.data.loader import StepLoader

SAMPLES, RANKS = (10**6, 10**8, 10**10, 10**12), (2, 8, 64, 512)
FILES, OF_ONE_FILE = 1000, 10**9
ROW_TOKENS, ROWS, DOCUMENT_TOKENS = 5, 8, 1000
FAR = 10**8
"""The step that a resume begins with."""
FLAT, ROUNDS, NEXT_STEPS = 1.5, 9, 20
LIMIT_MS = 10.0
"""For what grows with the number of files: the index names them."""


@dataclass(kw_only=True)
class Cost:
    """Of one rank, in milliseconds, one number for each round."""

    first: list[float] = field(default_factory=list)
    """Open the folder and make the first step."""
    following: list[float] = field(default_factory=list)
    """Make one more step."""
    resumed: list[float] = field(default_factory=list)
    """Open the folder and make step 1e8."""
    state_bytes: int = 0


Key = tuple[int, int]
"""Samples and ranks."""
KEYS: list[Key] = [
    *((samples, 64) for samples in (*SAMPLES, OF_ONE_FILE)),
    *((SAMPLES[-1], ranks) for ranks in RANKS),
]


def measure(folder: Path) -> dict[Key, Cost]:
    """Return what each size costs."""
    for samples in (*SAMPLES, OF_ONE_FILE):
        files = 1 if samples == OF_ONE_FILE else FILES
        tokens = samples // files * ROW_TOKENS
        write_virtual(folder / str(samples), files, tokens, tokens // DOCUMENT_TOKENS)
    found = {key: Cost() for key in KEYS}
    for number in range(1 + ROUNDS):
        for key in found:
            _once(folder / str(key[0]), key[1], found[key] if number else Cost())  # warms up
    return found


def _once(folder: Path, ranks: int, cost: Cost) -> None:
    def opened() -> StepLoader:
        return open_loader(folder, ROW_TOKENS, ROWS * ranks, ROWS, ranks)

    cost.first.append(_milliseconds(lambda: opened().step(0)))
    cost.resumed.append(_milliseconds(lambda: opened().step(FAR)))
    loader = opened()
    cost.state_bytes = len(json.dumps(loader.state(FAR)))
    loader.step(0)
    steps = (partial(loader.step, number) for number in range(1, NEXT_STEPS + 1))
    cost.following.append(median(map(_milliseconds, steps)))


def _milliseconds(work: Callable[[], object]) -> float:
    start = process_time()
    work()
    return 1000 * (process_time() - start)


def figures() -> list[Figure]:
    """Compare the largest corpus with the smallest, and 64 and 512 ranks with 2."""
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name))
    most, least = SAMPLES[-1], SAMPLES[0]
    pairs = [
        (f"{most:.0e} samples beside {least:.0e}", found[most, 64], found[least, 64]),
        (f"64 ranks beside 2, {most:.0e} samples", found[most, 64], found[most, 2]),
        (f"512 ranks beside 2, {most:.0e} samples", found[most, 512], found[most, 2]),
    ]
    return [*(figure for pair in pairs for figure in _of(*pair)), _of_files(found)]


def _of_files(found: dict[Key, Cost]) -> Figure:
    many, one = found[SAMPLES[-1], 64].first, found[OF_ONE_FILE, 64].first
    return Figure(
        name=f"first batch, ms ({FILES:,} files beside one)", ours=spread(many),
        theirs=spread(one), target=f"<= {LIMIT_MS:g} ms", limit=LIMIT_MS, value=median(many),
        is_upper=True,
    )  # fmt: skip


def _of(what: str, large: Cost, small: Cost) -> list[Figure]:
    sides: dict[str, tuple[list[float], list[float]]] = {
        "first batch, ms": (large.first, small.first),
        "next batch, ms": (large.following, small.following),
        "first batch of a resume at step 1e8, ms": (large.resumed, small.resumed),
        "state of the data, bytes": ([large.state_bytes], [small.state_bytes]),
    }
    return [
        Figure(
            name=f"{name} ({what})", ours=spread(ours), theirs=spread(theirs),
            target=f"<= {FLAT:g}x", limit=FLAT, value=median(ours) / median(theirs), is_upper=True,
        )
        for name, (ours, theirs) in sides.items()
    ]  # fmt: skip
