"""Every requested layout against one process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.precision import PRECISIONS
from trainer.run import Run
from trainer.verify.compare import EXACT, STANDARDS, Check, first_step, later_steps
from trainer.verify.faults import FAULTS
from trainer.verify.forked import RankFailedError, run_ranks
from trainer.verify.layouts import NamedLayout
from trainer.verify.measure import Answer, Question, answer
from trainer.verify.rows import MadeRows
from trainer.verify.shrink import Small

LIMIT_SECONDS = 180.0
SINGLE = NamedLayout(name="single", mesh=MeshSpec())


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
    if any(isinstance(layout.engine, DeepSpeedEngine) for layout in layouts):
        import_deepspeed("cpu")  # once, not in every rank
    verdicts = []
    with TemporaryDirectory(prefix="tessera-verify-") as folder:
        for verdict in _verdicts(small, layouts, Path(folder), steps, inject):
            on_verdict(verdict)
            verdicts.append(verdict)
    return verdicts


def _verdicts(
    small: Small, layouts: list[NamedLayout], folder: Path, steps: int, inject: str | None
) -> Iterator[Verdict]:
    savers: dict[str, tuple[str, Answer]] = {}
    reference: Answer | None = None
    for layout in layouts:
        run = layout.of(small.run)
        if reason := _impossible(run, small, layout, inject):
            yield Verdict(layout=layout, impossible=reason)
            continue
        for precision in ("fp64", layout.precision):  # the reference is fp64, whoever is compared
            if precision not in savers:
                name = f"single_{precision}"
                single = replace(SINGLE, name=name, precision=precision)
                savers[precision] = name, _ask(_question(single, small, folder, steps), 1)
        reference = reference or savers["fp64"][1]
        start = monotonic()
        saved_by, saver = savers[layout.precision]
        question = _question(layout, small, folder, steps)
        question = replace(
            question, resumed=folder / saved_by, fault=FAULTS[inject] if inject else None
        )
        try:
            found = _ask(question, layout.processes)
        except RankFailedError as error:
            yield Verdict(layout=layout, failure=str(error), seconds=monotonic() - start)
            continue
        if found.complaints:
            failure = f"{found.complaints[0]} ({len(found.complaints)} such tensors)"
            yield Verdict(layout=layout, failure=failure, seconds=monotonic() - start)
            continue
        standard = EXACT if run.is_topology_free else STANDARDS[layout.precision]
        checks = first_step(found, reference, standard)
        checks += later_steps(found, reference, saver, standard)
        seconds = monotonic() - start
        yield Verdict(layout=layout, checks=tuple(checks), saved_by=saved_by, seconds=seconds)
        savers[layout.precision] = layout.name, found


def _question(layout: NamedLayout, small: Small, folder: Path, steps: int) -> Question:
    run = layout.of(small.run)
    return Question(
        run=run, rows=_rows(run, small, layout), steps=steps, folder=folder / layout.name
    )


def _rows(run: Run, small: Small, layout: NamedLayout) -> MadeRows:
    """Return the rows in two micro-batches for each data rank: how they are cut is no maths."""
    if run.is_topology_free:
        return small.rows
    axes = run.mesh.axes(layout.processes)
    data_ranks = axes["dp_replicate"] * axes["dp_shard"]
    return replace(small.rows, micro_rows=small.rows.rows // (2 * data_ranks))


def _ask(question: Question, processes: int) -> Answer:
    first: Answer = run_ranks(processes, answer, question, limit_seconds=LIMIT_SECONDS)[0]
    return first


def _impossible(run: Run, small: Small, layout: NamedLayout, inject: str | None) -> str:
    """Return why the small model cannot be laid out so, or nothing."""
    if inject and not isinstance(run.engine, NativeEngine):
        return "faults are put into the native engine"
    axes = run.mesh.axes(layout.processes)
    data_ranks = axes["dp_replicate"] * axes["dp_shard"]
    rows = _rows(run, small, layout)
    try:
        run.check_sums(axes)
        run.engine.check(
            run.trained_model(), run.model.layout, axes,
            row_tokens=rows.tokens, micro_batches=rows.rows // (data_ranks * rows.micro_rows),
            precision=PRECISIONS[run.precision],
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return ""
