"""From a checked run to training, in the one order that works."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from trainer.adapters.contents import contents_of
from trainer.banner import describe
from trainer.best import Best
from trainer.callbacks.protocol import RunView
from trainer.checkpoint.lock import RunLock
from trainer.control import ControlWord, StopRequest
from trainer.distributed import Placement, Ranks
from trainer.engines.topology_free import NUM_THREADS
from trainer.judges import answer_judge, evaluator_of
from trainer.loop import Loop
from trainer.mesh import Mesh
from trainer.meter import Meter
from trainer.new_tokens import starting_at_mean
from trainer.parallel.materialise import Values, random_values
from trainer.phases import PhasedEngine
from trainer.precision import PRECISIONS
from trainer.progress import Progress
from trainer.protocols import Engine
from trainer.resume import checkpoints_of, open_record, resume
from trainer.run import Run
from trainer.run_data import build_data
from trainer.settle import settle
from trainer.trackers.tracking import Tracking
from trainer.validation.spec import VALIDATION
from trainer.whereabouts import Whereabouts


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run."""

    placement: Placement
    locate: Callable[[int], Path]
    """Returns the folder of this start of a run of so many steps, RUN/attempts/NNN with its
    config.yaml; called on rank 0 only."""
    request: StopRequest
    whereabouts: Whereabouts = field(default_factory=Whereabouts)


def fit(run: Run, start: Start) -> bool:
    """Train to max_steps; return False when a stop was requested before. Collective.

    Ten steps: check, ranks and mesh, model on meta, freeze, layout, weights, engine, data, resume,
    fit.
    """
    run.check(start.placement.world_size)
    run = settle(run)
    # Before any thread is started, which inherits it: denormal numbers made a CPU step 1.5x slower.
    torch.set_flush_denormal(True)
    if run.is_topology_free:
        torch.set_num_threads(NUM_THREADS)
    from torch import _dynamo  # noqa: F401  optimizers do, for seconds: not while ranks wait

    start.whereabouts.enter("connect")
    ranks = Ranks(start.placement, run.timeout_seconds)
    located = str(start.locate(run.num_steps)) if start.placement.is_main else ""
    attempt = Path(ranks.broadcast_text(located))
    start.whereabouts.share(attempt, start.placement.rank)
    folder = attempt.parent.parent
    lock = RunLock(folder) if start.placement.is_main else None
    try:
        return _train(run, start, ranks, attempt, lock)
    finally:  # no collectives here: the others may have failed
        if lock:
            lock.release()
        start.whereabouts.close()


def _train(run: Run, start: Start, ranks: Ranks, attempt: Path, lock: RunLock | None) -> bool:
    """Build everything on the connected ranks, and train."""
    start.whereabouts.enter("build")
    folder = attempt.parent.parent
    mesh_spec, reason = run.chosen_mesh(start.placement.world_size)
    mesh = mesh_spec.build(ranks=ranks)
    progress = Progress(ranks.device, tuple(run.data.named_sources))
    engine = PhasedEngine(
        run, lambda model, values: build_engine(run, model, ranks, mesh, values), progress.stopwatch
    )
    model = run.trained_model()
    meter = Meter(
        flops=lambda: engine.flops,
        world_size=start.placement.world_size,
        device=ranks.device,
        has_peak=PRECISIONS[run.precision].compute == torch.bfloat16,
    )
    contents = contents_of(run, ranks)
    tokenizer, loader, eval_loader = build_data(run, ranks, mesh)
    checkpoints = checkpoints_of(run, folder, ranks, mesh, lock, tokenizer, contents)
    start.whereabouts.enter("resume")
    best = Best(run.best)
    loader, skipped_in_a_row = resume(run, checkpoints, ranks, engine, loader, progress, best)
    record = open_record(folder, attempt, ranks, progress)
    engine.on_change = lambda trained: record.metrics(trained.step, "phase", trained.metrics())
    callbacks = [spec.build() for spec in run.callbacks.values() if spec is not None]
    callbacks.append(Tracking(run.tracker))
    view = RunView(
        run=run, folder=folder, is_main=start.placement.is_main, engine=engine,
        tokenizer=tokenizer, loader=loader, eval_loader=eval_loader,
        banner=describe(
            run, model, engine.trained, mesh, reason, ranks, loader, eval_loader, meter
        ),
    )  # fmt: skip
    loop = Loop(
        engine=engine, loader=loader, progress=progress, plan=run.plan,
        evaluator=evaluator_of(run, eval_loader, mesh, ranks.device),
        validator=answer_judge(
            run, eval_loader, mesh, ranks.device, training=loader.rows.store, tokenizer=tokenizer,
            page=folder / VALIDATION if start.placement.is_main else None,
        ),
        checkpoints=checkpoints, control=ControlWord(ranks), request=start.request, record=record,
        meter=meter, callbacks=callbacks, whereabouts=start.whereabouts, best=best,
        skipped_in_a_row=skipped_in_a_row,
    )  # fmt: skip
    is_finished = _fit(loop, view)
    ranks.barrier()  # rank 0 may still print: nobody leaves before the work is done
    ranks.close()
    return is_finished


def build_engine(
    run: Run, model: nn.Module, ranks: Ranks, mesh: Mesh, values: Values | None = None
) -> Engine:
    """Lay the meta model out, give it weights, and put the optimizer on the pieces.

    `values` are those to start from; None: what the run's settings say.
    """
    values = values or _initial_values(run, model)
    around = run.surroundings(model, mesh, ranks.device)
    laid_out = run.engine.lay_out(model, around)
    laid_out.fill(ranks.device, values)
    return run.engine.build(laid_out, around)


def _initial_values(run: Run, model: nn.Module) -> Values:
    """Of the whole model: how a weight starts may follow from its shape."""
    source, std = run.weight_source(model), run.model.initializer_range
    values = source.values(model, std, run.seed) if source else random_values(model, std, run.seed)
    given = frozenset(source.entries) if source else frozenset()
    return run.adapter.values(model, starting_at_mean(model, values, given))


def _fit(loop: Loop, view: RunView) -> bool:
    for callback in loop.callbacks:
        callback.on_start(view, loop.progress)
    try:
        is_finished = loop.fit()
    except ValueError as error:  # past the checks, a wrong value is a defect and no bad config
        raise RuntimeError(f"after step {loop.progress.step}: {error}") from error
    loop.whereabouts.enter("end")
    for callback in loop.callbacks:
        callback.on_end(loop.progress, finished=is_finished)
    loop.record.close()
    return is_finished
