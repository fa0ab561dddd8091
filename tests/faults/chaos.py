"""Kill a run again and again, and prove that it is the run that nobody killed.

    python -m tests.faults.chaos --kills 100 --seed 42 --steps 6000 [--forked] [group=choice ..]

Waits until the ledger shows a step of a new start, then up to 0.45 s, kills a random rank or the
supervisor with SIGKILL, and starts the same command again. Prints what was found as JSON; exit code
1 where a sample was lost or doubled, or anything differs from the uninterrupted run in one bit.
`--forked` starts ranks from this process, which has imported torch, in place of `tessera train`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import xxhash

from launch.ledger import proved
from tests.faults.starts import Commands, Forks
from trainer.checkpoint.commit import committed_steps, step_folder
from trainer.files import read_lines
from trainer.points import METRICS

LONGEST_WAIT = 0.45  # seconds between a start's first step and its end
STUCK_SECONDS = 120.0
POLL_SECONDS = 0.005
TINY = [
    "experiment=demo", "model.hidden_size=32", "model.intermediate_size=64",
    "model.num_hidden_layers=1", "data.row_tokens=32", "data.global_rows=8", "data.micro_rows=2",
    "data.max_documents=10", "callbacks.ngrams=null", "callbacks.closing.sample_tokens=0",
    "eval_every=null", "log_every=1", "save_every=10", "deterministic=topology_free",
    "precision=fp32", "mesh=ddp",
]  # fmt: skip


class Starts(Protocol):
    """One command, started again and again."""

    def start(self) -> None: ...

    @property
    def code(self) -> int | None:
        """The exit code of the last start; None while it runs."""
        ...

    def kill(self, victim: int) -> bool:
        """Kill a rank, or the supervisor behind the last of them; return whether it was there."""
        ...

    def end(self) -> None:
        """Kill whatever is left."""
        ...


@dataclass
class Soak:
    """What happened to a run."""

    kills: int = 0
    recoveries: list[float] = field(default_factory=list)
    """Seconds from each kill to the first step of the next start, as the ledger shows it."""
    seen: list[int] = field(default_factory=list)
    """The step that each start was first seen at."""
    code: int | None = None

    @property
    def p95(self) -> float:
        return (
            quantiles(self.recoveries, n=20, method="inclusive")[-1]
            if len(self.recoveries) > 1
            else 0.0
        )


class Attempts:
    """Says which start, and which step, the newest line of rank 0's ledger is of."""

    def __init__(self, run: Path) -> None:
        self._path, self._place, self._rest = run / "ledger/rank00000.jsonl", 0, b""

    def newest(self) -> tuple[int, int] | None:
        """Return start and step of the newest line since the last call; None: there is none."""
        if not self._path.exists():
            return None
        with open(self._path, "rb") as file:
            file.seek(self._place)
            new = file.read()
        self._place += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in reversed(lines):
            try:
                found = json.loads(line)
                return int(found["attempt"]), int(found["step"])
            except ValueError:
                continue  # torn by a kill
        return None


def soak(starts: Starts, run: Path, *, kills: int, seed: int, ranks: int) -> Soak:
    """Start, kill and start again until `kills` were delivered; then let the run end."""
    generator, found, attempts = random.Random(seed), Soak(), Attempts(run)
    killed_at: float | None = None
    starts.start()
    try:
        for step in _new_starts(starts, attempts):
            found.seen.append(step)
            if killed_at is not None:
                found.recoveries.append(time.monotonic() - killed_at)
                killed_at = None
            if found.kills == kills:
                continue
            time.sleep(generator.uniform(0, LONGEST_WAIT))
            if starts.kill(generator.randrange(ranks + 1)):
                found.kills += 1
                killed_at = time.monotonic()
        found.code = starts.code
    finally:
        starts.end()
    return found


def _new_starts(starts: Starts, attempts: Attempts) -> Iterator[int]:
    """Yield the step that each start is seen at; start again when one has ended but with 0."""
    known, deadline, failures = 0, time.monotonic() + STUCK_SECONDS, 0
    while starts.code != 0:
        newest = attempts.newest()
        if newest is not None and newest[0] > known:
            known, deadline, failures = newest[0], time.monotonic() + STUCK_SECONDS, 0
            yield newest[1]
        elif starts.code is not None:
            failures += 1
            if failures > 3:
                raise RuntimeError(f"three starts in a row made no step; last code {starts.code}")
            starts.start()
        elif newest is not None:
            deadline = time.monotonic() + STUCK_SECONDS
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step for {STUCK_SECONDS} s after start {known}")
        time.sleep(POLL_SECONDS)


def curve(run: Path) -> list[tuple[int, str]]:
    """Return step and loss of every log point, to the last bit."""
    lines = read_lines(run / METRICS)
    return [(line["step"], float(line["loss"]).hex()) for line in lines if line["split"] == "train"]


def last_weights(run: Path) -> dict[str, str]:
    """Return a hash of every file of tensors in the newest checkpoint: model and optimizer."""
    folder = step_folder(run / "checkpoints", max(committed_steps(run / "checkpoints")))
    return {
        str(path.relative_to(folder)): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in sorted(folder.rglob("*.safetensors"))
    }


def experiment(
    folder: Path, words: list[str], *, kills: int, seed: int, ranks: int, is_forked: bool
) -> dict[str, Any]:
    """Train twice, once with kills; return what was found and whether both are one run."""
    words = [*TINY, f"runs={folder}", f"data.cache={folder}/cache", *words]
    make = Forks if is_forked else Commands
    whole = soak(make([*words, "name=whole"], folder, ranks), folder / "whole",
                 kills=0, seed=seed, ranks=ranks)  # fmt: skip
    began = time.monotonic()
    killed = soak(make([*words, "name=killed"], folder, ranks), folder / "killed",
                  kills=kills, seed=seed, ranks=ranks)  # fmt: skip
    seconds = time.monotonic() - began
    proof, attempts = proved(folder / "killed")
    found = {
        "kills": killed.kills,
        "codes": [whole.code, killed.code],
        "attempts": attempts,
        "seconds": round(seconds, 1),
        "last_start_at": killed.seen[-1],
        "recovery_median": round(median(killed.recoveries), 2) if killed.recoveries else None,
        "recovery_p95": round(killed.p95, 2),
        **asdict(proof),
        "is_curve_equal": curve(folder / "whole") == curve(folder / "killed"),
        "points": len(curve(folder / "killed")),
        "are_weights_equal": last_weights(folder / "whole") == last_weights(folder / "killed"),
    }
    found["holds"] = (
        proof.holds
        and killed.kills == kills
        and found["codes"] == [0, 0]
        and found["is_curve_equal"]
        and found["are_weights_equal"]
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--forked", action="store_true")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = experiment(
            Path(folder), [*words, f"max_steps={options.steps}"], kills=options.kills,
            seed=options.seed, ranks=options.ranks, is_forked=options.forked,
        )  # fmt: skip
    print(json.dumps(found))
    return int(not found["holds"])


if __name__ == "__main__":
    sys.exit(main())
