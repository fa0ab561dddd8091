"""From a checked run to training, in the one order that works."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from trainer.adapters.contents import contents_of
from trainer.banner import counts, describe
from trainer.best import Best
from trainer.callbacks.protocol import Callback, RunView
from trainer.checkpoint.lock import RunLock
from trainer.control import ControlWord, StopRequest
from trainer.determinism import bits_of, fix_bits
from trainer.distributed import Placement, Ranks
from trainer.engines.padding import skip_padding
from trainer.evaluations import Evaluations
from trainer.judges import answer_judge, evaluator_of, sample_of
from trainer.loop import Loop
from trainer.mesh import Mesh
from trainer.meter import Meter, held_before
from trainer.new_tokens import starting_at_mean
from trainer.notes import ABOUT, write_note
from trainer.numerics.guard import Guard
from trainer.numerics.watch import RewindError, Watch
from trainer.out_of_memory import in_words
from trainer.parallel.legal import check_gradients
from trainer.parallel.materialise import Values, random_values
from trainer.phases import PhasedEngine
from trainer.precision import PRECISIONS
from trainer.progress import Progress
from trainer.protocols import Engine
from trainer.replicas import Replicas
from trainer.resume import Place, checkpoints_of, open_record, resume
from trainer.rewind import go_back
from trainer.run import Run
from trainer.run_data import build_data
from trainer.settle import settle
from trainer.start_up import import_the_rest, wake_collector
from trainer.stopping import Stopping
from trainer.time_limit import TimeLimit
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
    limit: TimeLimit = field(default_factory=TimeLimit)
    is_again: bool = False
    """Whether the same command has said before what it trains."""

    def stopping(self, control: ControlWord) -> Stopping:
        """Return what ends the run early."""
        return Stopping(
            control=control, request=self.request, limit=self.limit, whereabouts=self.whereabouts
        )


def fit(run: Run, start: Start) -> bool:
    """Train to max_steps; return False when a stop was requested before. Collective.

    Ten steps: check, ranks and mesh, model on meta, freeze, layout, weights, engine, data, resume,
    fit.
    """
    run.check(start.placement.world_size)
    run = settle(run)
    # Before any thread is started, which inherits it: denormal numbers made a CPU step 1.5x slower.
    torch.set_flush_denormal(True)
    fix_bits(run)
    import_the_rest(is_compiled=run.engine.is_compiled)
    wake_collector()
    start.whereabouts.enter("connect")
    ranks = Ranks(start.placement, run.timeout_seconds)
    located = str(start.locate(run.num_steps)) if start.placement.is_main else ""
    attempt = Path(ranks.broadcast_text(located))
    start.whereabouts.share(attempt, start.placement.rank)
    folder = attempt.parent.parent
    lock = RunLock(folder) if start.placement.is_main else None
    try:
        return _train(run, start, ranks, attempt, lock)
    except (RuntimeError, MemoryError) as error:
        if (exhausted := in_words(error, run, ranks, start.whereabouts.place)) is not None:
            raise exhausted from error
        raise
    finally:  # no collectives here: the others may have failed
        if lock:
            lock.release()
        start.whereabouts.close()


def _train(run: Run, start: Start, ranks: Ranks, attempt: Path, lock: RunLock | None) -> bool:
    """Build everything on the connected ranks, and train."""
    start.whereabouts.enter("build")
    before = held_before(ranks.device)
    folder, is_main = attempt.parent.parent, start.placement.is_main
    mesh_spec, why = run.chosen_mesh(start.placement.world_size)
    mesh = mesh_spec.build(ranks=ranks)
    progress = Progress(ranks.device, tuple(run.data.named_sources))
    guard = Guard(run.spike)
    engine = phased_engine(run, ranks, mesh, guard, progress)
    model = run.trained_model()
    meter = _meter(run, engine, ranks)
    contents = contents_of(run, ranks)
    tokenizer, loader, eval_loader = build_data(run, ranks, mesh)
    checkpoints = checkpoints_of(run, attempt, ranks, mesh, lock, tokenizer, contents, loader)
    start.whereabouts.enter("resume")
    # Rank 0's word: on ranks that read other files there must not be another best.
    best = Best(run.best, ranks.broadcast_text(sample_of(run, eval_loader)))
    bits = bits_of(ranks, mesh)
    place = Place(progress=progress, best=best, guard=guard, loader=loader, bits=bits)
    place = resume(run, checkpoints, ranks, engine, place)
    loader = place.loader
    record = open_record(folder, attempt, ranks, progress, loader)
    callbacks = _callbacks(run)
    view = RunView(
        run=run, folder=folder, is_main=is_main, engine=engine, tokenizer=tokenizer,
        loader=loader, eval_loader=eval_loader, start=int(attempt.name), is_again=start.is_again,
        banner=describe(run, model, engine.trained, mesh, why, ranks, loader, eval_loader, meter),
    )  # fmt: skip
    if is_main:
        found = counts(run, engine.trained, loader, eval_loader)
        write_note(folder, ABOUT, {**found, **before, "banner": view.banner})
    validator = answer_judge(
        run, eval_loader, mesh, ranks.device, training=loader.rows.store, tokenizer=tokenizer,
        page=folder / VALIDATION if is_main else None,
    )  # fmt: skip
    control = ControlWord(ranks)
    stopping = start.stopping(control)
    loop = Loop(
        engine=engine, loader=loader, progress=progress, plan=run.plan,
        evaluations=Evaluations(
            evaluator=evaluator_of(run, eval_loader, mesh, ranks.device), validator=validator,
            plan=run.plan, progress=progress, best=best, stopping=stopping,
            whereabouts=start.whereabouts, callbacks=callbacks,
        ),
        checkpoints=checkpoints, control=control, record=record, stopping=stopping,
        meter=meter, callbacks=callbacks, whereabouts=start.whereabouts, best=best, guard=guard,
        watch=Watch(
            spike=run.spike, max_skipped_in_a_row=run.max_skipped_in_a_row, ranks=ranks,
            checkpoints=checkpoints.folder, skipped_in_a_row=place.skipped_in_a_row,
            settle=checkpoints.finish,
        ),
        bits=bits, replicas=Replicas(run.check_replicas_every, ranks, mesh),
    )  # fmt: skip
    # The loop's, which is another one after a rewind.
    engine.on_change = lambda trained: loop.record.metrics(trained.step, "phase", trained.metrics())
    is_finished = _fit(loop, view, engine, ranks)
    ranks.barrier()  # rank 0 may still print: nobody leaves before the work is done
    ranks.close()
    return is_finished


def _meter(run: Run, engine: PhasedEngine, ranks: Ranks) -> Meter:
    precision = PRECISIONS[run.precision]
    return Meter(
        flops=lambda: engine.flops,
        world_size=ranks.placement.world_size,
        device=ranks.device,
        has_peak=precision.compute == torch.bfloat16 and not precision.is_float8,
    )


def phased_engine(
    run: Run, ranks: Ranks, mesh: Mesh, guard: Guard, progress: Progress
) -> PhasedEngine:
    """Return the engine of all phases of a run, which one guard judges."""

    def build(model: nn.Module, values: Values | None) -> Engine:
        check_gradients(model, ranks.device)
        return build_engine(run, model, ranks, mesh, values, guard)

    return PhasedEngine(run, build, progress.stopwatch)


def build_engine(
    run: Run,
    model: nn.Module,
    ranks: Ranks,
    mesh: Mesh,
    values: Values | None = None,
    guard: Guard | None = None,
) -> Engine:
    """Lay the meta model out, give it weights, and put the optimizer on the pieces.

    `values` are those to start from; None: what the run's settings say. `guard` judges its steps;
    None: one of its own.
    """
    values = values or _initial_values(run, model)
    around = run.surroundings(model, mesh, ranks.device, guard)
    skip_padding(model, around, is_compiled=run.engine.is_compiled)
    laid_out = run.engine.lay_out(model, around)
    laid_out.fill(ranks.device, values)
    return run.engine.build(laid_out, around)


def _callbacks(run: Run) -> list[Callback]:
    """Return the listeners in the order of their turns: trackers come when all is said."""
    chosen = [spec.build() for spec in run.callbacks.values() if spec is not None]
    return [*chosen, Tracking(run.tracker)]


def _initial_values(run: Run, model: nn.Module) -> Values:
    """Of the whole model: how a weight starts may follow from its shape."""
    source, std = run.weight_source(model), run.model.initializer_range
    values = source.values(model, std, run.seed) if source else random_values(model, std, run.seed)
    given = frozenset(source.entries) if source else frozenset()
    return run.adapter.values(model, starting_at_mean(model, values, given))


def _fit(loop: Loop, view: RunView, engine: PhasedEngine, ranks: Ranks) -> bool:
    try:
        for callback in loop.callbacks:
            callback.on_start(view, loop.progress)
        is_finished = _fit_with_rewinds(loop, view, engine, ranks)
    finally:
        for callback in loop.callbacks:
            callback.on_close()
        loop.checkpoints.close()  # its process holds the run's lock, too
    loop.whereabouts.enter("end")
    for callback in loop.callbacks:
        callback.on_end(loop.progress, finished=is_finished)
    loop.record.close()
    return is_finished


def _fit_with_rewinds(loop: Loop, view: RunView, engine: PhasedEngine, ranks: Ranks) -> bool:
    while True:
        try:
            return loop.fit()
        except ValueError as error:  # past the checks, a wrong value is a defect and no bad config
            raise RuntimeError(f"after step {loop.progress.step}: {error}") from error
        except RewindError as error:
            go_back(loop, view.run, engine, ranks, error)
            view = replace(view, loader=loop.loader)
            for callback in loop.callbacks:
                callback.on_rewind(view, loop.progress)
