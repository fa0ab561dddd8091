"""Every requested layout against one process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from trainer.mesh import MeshSpec
from trainer.run import Run
from trainer.verify.compare import NATIVE_TOLERANCE, Check, first_step, later_steps
from trainer.verify.faults import FAULTS
from trainer.verify.forked import RankFailedError, run_ranks
from trainer.verify.layouts import NamedLayout
from trainer.verify.measure import Answer, Question, answer
from trainer.verify.shrink import Small

LIMIT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one layout came to."""

    layout: NamedLayout
    checks: tuple[Check, ...] = ()
    impossible: str = ""
    """Why the model cannot be laid out so; nothing was computed."""
    failure: str = ""
    """What went wrong while it was computed."""
    saved_by: str = ""
    """The layout whose checkpoint this one resumed."""
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        return not self.failure and all(check.passes for check in self.checks)

    @property
    def worst(self) -> Check | None:
        return max(self.checks, key=lambda check: check.severity, default=None)


def verify(
    small: Small,
    layouts: list[NamedLayout],
    *,
    steps: int = 20,
    inject: str | None = None,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """Return a verdict on each layout, in order; `on_verdict` hears each as it comes.

    One process computes the reference. Each layout then computes the same, saves, and resumes what
    the layout before it saved. `inject` names a fault that every layout gets, and no reference.
    Forks: no thread may run in this process.
    """
    torch.set_num_threads(1)
    verdicts = []
    with TemporaryDirectory(prefix="tessera-verify-") as folder:
        for verdict in _verdicts(small, layouts, Path(folder), steps, inject):
            on_verdict(verdict)
            verdicts.append(verdict)
    return verdicts


def _verdicts(
    small: Small, layouts: list[NamedLayout], folder: Path, steps: int, inject: str | None
) -> Iterator[Verdict]:
    single = replace(small.run, mesh=MeshSpec())
    question = Question(run=single, rows=small.rows, steps=steps, folder=folder / "single")
    reference = _ask(question, 1)
    saver_name, saver = "single", reference
    for layout in layouts:
        run = layout.of(small.run)
        if reason := _impossible(run, small, layout):
            yield Verdict(layout=layout, impossible=reason)
            continue
        start = monotonic()
        question = Question(
            run=run, rows=small.rows, steps=steps, folder=folder / layout.name,
            resumed=folder / saver_name, fault=FAULTS[inject] if inject else None,
        )  # fmt: skip
        try:
            found = _ask(question, layout.processes)
        except RankFailedError as error:
            yield Verdict(layout=layout, failure=str(error), seconds=monotonic() - start)
            continue
        if found.complaints:
            failure = f"{found.complaints[0]} ({len(found.complaints)} such tensors)"
            yield Verdict(layout=layout, failure=failure, seconds=monotonic() - start)
            continue
        checks = first_step(found, reference, NATIVE_TOLERANCE)
        checks += later_steps(found, reference, saver)
        yield Verdict(
            layout=layout, checks=tuple(checks), saved_by=saver_name, seconds=monotonic() - start
        )
        saver_name, saver = layout.name, found


def _ask(question: Question, processes: int) -> Answer:
    first: Answer = run_ranks(processes, answer, question, limit_seconds=LIMIT_SECONDS)[0]
    return first


def _impossible(run: Run, small: Small, layout: NamedLayout) -> str:
    """Return why the small model cannot be laid out so, or nothing."""
    axes = run.mesh.axes(layout.processes)
    per_step = small.rows.rows // (axes["dp_replicate"] * axes["dp_shard"] * small.rows.micro_rows)
    try:
        run.engine.check(
            run.plan_model(), run.model.layout, axes,
            row_tokens=small.rows.tokens, micro_batches=per_step,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return ""
