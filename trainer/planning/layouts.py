"""Every layout that a run may have on so many processes, and what its ranks would hold."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.parallel.fully_sharded import FullySharded
from trainer.planning.facts import facts_of
from trainer.planning.memory import Memory, memory_of
from trainer.run import Run

NODE = 8  # ranks with fast links between them: tensor-parallel ones stay within


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layout: its memory, or why the run cannot have it."""

    name: str
    memory: Memory | None
    problem: str = ""


def rows_of(run: Run, processes: int) -> Iterator[Row]:
    """Yield every layout as soon as it is known, on GPUs."""
    for name, changed in layouts(run, processes).items():
        try:
            facts_of(changed, processes, None)
        except ValueError as error:
            yield Row(name=name, memory=None, problem=str(error))
            continue
        yield Row(name=name, memory=memory_of(changed, processes, is_gpu=True))


def layouts(run: Run, processes: int) -> dict[str, Run]:
    """Return the run in every layout by name; the user's activation checkpointing stays."""
    meshes = {"single": MeshSpec()} if processes == 1 else dict(_meshes(processes))
    recompute = run.engine.activation_checkpointing
    native = NativeEngine(activation_checkpointing=recompute)
    engine: Any = run.engine if isinstance(run.engine, NativeEngine) else native
    found = {
        name: replace(run, mesh=mesh, engine=_settings(engine, mesh))
        for name, mesh in meshes.items()
    }
    zero = DeepSpeedEngine(activation_checkpointing=recompute)
    if isinstance(run.engine, DeepSpeedEngine):
        zero = replace(run.engine, offload_parameters=False)
    copies = MeshSpec(dp_replicate=processes)
    for stage in (1, 2, 3) if processes > 1 else ():
        found[f"zero{stage}"] = replace(run, mesh=copies, engine=replace(zero, stage=stage))
    return found


def _settings(engine: NativeEngine, mesh: MeshSpec) -> NativeEngine:
    """Return the user's settings; those of FSDP2 only where something is sharded."""
    return engine if mesh.dp_shard > 1 else replace(engine, fsdp=FullySharded())


def _meshes(processes: int) -> Iterator[tuple[str, MeshSpec]]:
    yield "ddp", MeshSpec(dp_replicate=processes)
    yield "fsdp", MeshSpec(dp_shard=processes)
    node = NODE if processes > NODE else processes // 2
    if node > 1 and processes % node == 0:
        name = f"hsdp {processes // node}x{node}"
        yield name, MeshSpec(dp_replicate=processes // node, dp_shard=node)
    for axis in ("tp", "cp", "pp"):
        for length in (2, 4, 8):
            if processes % length == 0:
                rest = processes // length
                name = f"{axis}{length}" + (f" x fsdp{rest}" if rest > 1 else "")
                yield name, MeshSpec(**{axis: length, "dp_shard": rest})
