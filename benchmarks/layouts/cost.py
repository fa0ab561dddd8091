"""Step time and memory of one layout, on this machine's CPU."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from launch.binding import bind
from launch.compose import compose
from launch.host_memory import keep_freed_memory
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.meter import host_bytes
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.run import Run
from trainer.settings import OFF, TOPOLOGY_FREE
from trainer.verify.forked import run_ranks
from trainer.verify.layouts import LAYOUTS, NamedLayout
from trainer.verify.rows import MadeRows

PLAIN = "plain"
ROWS = MadeRows(vocab_size=258, rows=8, tokens=256, micro_rows=2)
WARMUP, STEPS = 2, 6


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A layout, and the mode that it runs in."""

    layout: NamedLayout
    deterministic: str = OFF

    def of(self, run: Run) -> Run:
        changed = replace(run, deterministic=self.deterministic, mesh=self.layout.mesh)
        return replace(changed, engine=self.layout.engine)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one round of a variant took."""

    seconds: float
    """Median step."""
    mib: float
    """Peak of rank 0's memory above what it held before the model was built."""


def _single(name: str, **settings: object) -> Variant:
    engine = NativeEngine(**settings)  # type: ignore[arg-type]
    return Variant(layout=NamedLayout(name=name, mesh=MeshSpec(), engine=engine))


def _recomputed(mode: str) -> ActivationCheckpointing:
    return ActivationCheckpointing(mode=mode)


VARIANTS: dict[str, Variant] = {
    PLAIN: _single(PLAIN),
    "plain, full checkpointing": _single("", activation_checkpointing=_recomputed("full")),
    "plain, selective checkpointing": _single(
        "", activation_checkpointing=_recomputed("selective")
    ),
    "plain, compiled": _single("", compile=True),
    "plain, topology-free": replace(_single(""), deterministic=TOPOLOGY_FREE),
    **{name: Variant(layout=layout) for name, layout in LAYOUTS.items()},
    **{
        f"{name}, topology-free": Variant(layout=LAYOUTS[name], deterministic=TOPOLOGY_FREE)
        for name in ("ddp", "fsdp")
    },
}


def base_run() -> Run:
    """Return the demo: 3 M parameters, in fp32, which every engine computes in."""
    tree = compose(["experiment=demo", "name=layouts", "data.micro_rows=2"]).tree
    run: Run = bind({key: value for key, value in tree.items() if key != "launch"})
    return run


def measure(variant: Variant) -> Cost:
    """Return the costs of one start of `variant`; forks."""
    first: Cost = run_ranks(
        variant.layout.processes, _cost, variant.of(base_run()), limit_seconds=300.0
    )[0]
    return first


def _cost(placement: Placement, run: Run) -> Cost:
    cores = os.cpu_count() or 1
    torch.set_num_threads(1 if run.is_topology_free else max(1, cores // placement.world_size))
    torch.set_flush_denormal(True)
    keep_freed_memory("cpu", os.environ)  # as a rank of a run does
    ranks = Ranks(placement, 60.0)
    mesh = run.mesh.build(ranks=ranks)
    held = _start_counting()
    engine = build_engine(run, run.plan_model(), ranks, mesh)
    seconds = []
    for step in range(1, WARMUP + STEPS + 1):
        batches = ROWS.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        ranks.barrier()
        start = perf_counter()
        float(engine.train_step(step, batches, ROWS.num_tokens(batches)).grad_norm)
        seconds.append(perf_counter() - start)
    ranks.barrier()
    return Cost(seconds=median(seconds[WARMUP:]), mib=(host_bytes("VmHWM") - held) / 2**20)


def _start_counting() -> int:
    """Forget the peak so far; return the bytes that are held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return host_bytes("VmRSS")
