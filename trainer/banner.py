"""What is about to run, in words: a mistake is seen here first."""

from typing import Any

from torch import nn

from models.nn.backends import back_ends
from trainer.adapters.nf4 import describe_packed
from trainer.data.eval_loader import EvalLoader
from trainer.data.loader import StepLoader
from trainer.distributed import Ranks
from trainer.mesh import Mesh
from trainer.meter import Meter
from trainer.parallel.pieces import unique_parameters
from trainer.precision import PRECISIONS, slow_bf16
from trainer.run import Run
from trainer.settings import OFF, RUN, TOPOLOGY_FREE
from trainer.trained import Trained

MAX_CLASSES = 12  # whose weights are shown
_PROMISES = {
    OFF: "",
    RUN: ", repeatable: the same bits on this layout at every start",
    TOPOLOGY_FREE: ", topology-free: the same bits on 1, 2, 4, .. data ranks",
}
"""What `deterministic` says of a run."""


def _describe_model(model: nn.Module) -> str:
    """Return a line on the size of the whole model, which is not laid out yet."""
    total = sum(parameter.numel() for _, parameter in unique_parameters(model))
    memory = getattr(getattr(model, "trunk", None), "image_memory", None)
    kept = f", keeps {memory.max_bytes / 2**30:g} GiB of what it says of images" if memory else ""
    return f"{total / 1e6:.2f} M parameters{describe_packed(model)}{kept}" + "".join(
        f", attention by {name}" for name in sorted(back_ends(model))
    )


def _passes(loader: StepLoader, max_steps: int) -> str:
    """Return how often the run will have read each source."""
    each = (f"{name} {done:.2f}".lstrip() for name, done in loader.epochs(max_steps).items())
    return f"{', '.join(each)} epochs"


def _weights(weights: dict[str, float]) -> str:
    """Return what targets of each class count in training."""
    each = [f"{name} {weight:.4g}" for name, weight in weights.items()]
    more = f", and {len(each) - MAX_CLASSES} more" if len(each) > MAX_CLASSES else ""
    return f"weights {', '.join(each[:MAX_CLASSES])}{more}"


def _counted(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}" + plural * (number != 1)


def _describe_batch(loader: StepLoader) -> str:
    """Return how a step is made up; documents fill as many rows as they need."""
    unit, ranks = loader.rows.unit, _counted(loader.num_ranks, "rank")
    size = f"{_counted(loader.global_samples, unit.removesuffix('s'))} per step"
    rows, tokens = _counted(loader.micro_rows, "row"), f"{loader.rows.row_tokens:,} tokens"
    count, rest = divmod(loader.global_samples, loader.num_ranks * loader.micro_rows)
    if unit == "rows" and not rest:
        return f"{size} = {ranks} x {_counted(count, 'micro-batch', 'es')} x {rows} of {tokens}"
    return f"{size}, in rows of {tokens}: {ranks} x micro-batches of {rows}"


def _sample(loader: EvalLoader | None) -> str:
    """Return what an evaluation during training reads, where that is not all."""
    if loader is None or not loader.is_sample:
        return ""
    unit = loader.rows.unit
    return f", evaluations read {loader.num_read:,} of {loader.num_held_out:,} {unit} (eval_share)"


def describe(
    run: Run,
    model: nn.Module,
    trained: Trained,
    mesh: Mesh,
    reason: str,
    ranks: Ranks,
    loader: StepLoader,
    eval_loader: EvalLoader | None,
    meter: Meter,
) -> dict[str, str]:
    """Return one line each on model, what trains, layout, batch, data and the FLOP formula."""
    chosen = f" (mesh=auto: {reason})" if reason else ""
    store = loader.rows.store
    held_out = eval_loader.rows.store.num_documents if eval_loader else 0
    weights = getattr(run.task, "class_weights", {})
    return {
        "model": _describe_model(model),
        "trains": trained.describe(),
        "layout": f"{mesh.describe()}{chosen} on {ranks.device.type}, precision {run.precision}"
        + _PROMISES[run.deterministic]
        + (
            ", which this CPU has to emulate: fp32 is several times faster"
            if slow_bf16(PRECISIONS[run.precision], ranks.device)
            else ""
        ),
        "batch": _describe_batch(loader),
        "data": f"{store.num_tokens:,} tokens in {_counted(store.num_documents, 'document')}, "
        f"{_counted(run.num_steps, 'step')} = {_passes(loader, run.num_steps)}; "
        f"{_counted(held_out, 'document')} held out{_sample(eval_loader)}",
        **({"classes": _weights(weights)} if weights else {}),
        "FLOPs": meter.flops().describe(),
    }


def counts(
    run: Run, trained: Trained, loader: StepLoader, eval_loader: EvalLoader | None
) -> dict[str, Any]:
    """Return the numbers of the lines above and the like, for who reads the run's folder later."""
    store = loader.rows.store
    return {
        "parameters": trained.whole.parameters,
        "trained_parameters": trained.count.parameters,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "held_out_documents": eval_loader.rows.store.num_documents if eval_loader else 0,
        "max_steps": run.num_steps,
        "epochs": loader.epochs(run.num_steps),
        "fingerprint": store.fingerprint,
        "asks": run.asks,
    }
