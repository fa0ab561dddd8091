"""What the ranks of a real run held at most: tensor bytes by torch's profiler, RSS by Linux."""

import math
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.plan_memory.cases import Case
from benchmarks.starts import start_in
from trainer.callbacks.protocol import Callback
from trainer.construct import fit
from trainer.distributed import Placement
from trainer.meter import host_bytes, peak_memory_gib
from trainer.progress import Progress
from trainer.verify.forked import run_ranks

FIRST, LAST = "plan_memory.first", "plan_memory.last"


class _Over(Exception):  # noqa: N818  no error: enough was seen
    """The last step is done; what saves it is not measured."""


@dataclass
class Marks(Callback):
    """Marks in the profile where the steps begin and where they end: its own spec and callback."""

    kept: list[Any] = field(default_factory=list)

    def build(self) -> "Marks":
        return self

    def on_start(self, view: Any, progress: Progress) -> None:
        with record_function(FIRST):
            pass

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        if progress.step == 2:
            with record_function(LAST):
                pass
            raise _Over


@dataclass(frozen=True, kw_only=True)
class Held:
    """The most that one rank held."""

    tensor_bytes: int
    """During the steps, by torch's profiler."""
    rss_bytes: int
    """Of the whole process, above what it had before the run."""


def measured(case: Case, folder: Path, limit_seconds: float = 1800.0) -> list[Held]:
    """Train two steps of a case in forked ranks; return what each held at most."""
    run = replace(case.run(folder), callbacks={"marks": Marks()}, timeout_seconds=limit_seconds)
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        return run_ranks(
            case.processes, _held, Path(runs) / "run", run, limit_seconds=limit_seconds
        )


def _held(placement: Placement, folder: Path, run: Any) -> Held:
    before = host_bytes("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with suppress(_Over):
            fit(run, start_in(folder, placement))
        rss = peak_memory_gib(torch.device("cpu")) * 2**30
    return Held(tensor_bytes=peak_of(profiled, (FIRST, LAST)), rss_bytes=int(rss - before))


def peak_of(profiled: Any, between: tuple[str, str] | None = None) -> int:
    """Return the most bytes that were allocated at once beyond those at the start of a profile.

    `between`: only what was held between these two marks counts.
    """
    events = profiled.profiler.kineto_results.events()
    first, last = -math.inf, math.inf
    if between is not None:
        first, last = (next(e.start_ns() for e in events if e.name() == mark) for mark in between)
    held = peak = 0
    for at, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        if first <= at <= last:
            peak = max(peak, held)
    return peak
