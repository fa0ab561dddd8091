"""The layouts that `tessera verify` knows, by name."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import STAGES, DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.near_names import did_you_mean
from trainer.run import Run

NATIVE = NativeEngine()
_COPIES = MeshSpec(dp_replicate=2)
_TENSORS = MeshSpec(dp_replicate=2, tp=2)


@dataclass(frozen=True, kw_only=True)
class NamedLayout:
    """A mesh, and what of the engine goes with it."""

    name: str
    mesh: MeshSpec
    engine: Any = NATIVE
    """Settings of the engine, but for the user's activation checkpointing."""
    precision: str = "fp64"

    @property
    def processes(self) -> int:
        return prod(self.mesh.lengths.values())

    def of(self, run: Run) -> Run:
        """Return `run` in this layout."""
        recompute = run.engine.activation_checkpointing
        engine = replace(self.engine, activation_checkpointing=recompute)
        return replace(run, mesh=self.mesh, engine=engine, precision=self.precision)


def _layout(name: str, *, engine: NativeEngine = NATIVE, **axes: int) -> NamedLayout:
    return NamedLayout(name=name, mesh=MeshSpec(**axes), engine=engine)


def _zero(engine: DeepSpeedEngine, mesh: MeshSpec = _COPIES, suffix: str = "") -> NamedLayout:
    name = f"zero{engine.stage}{suffix}" + ("_offload" if engine.offload_optimizer else "")
    return NamedLayout(name=name, mesh=mesh, engine=engine, precision="fp32")


_NO_SP = NativeEngine(sequence_parallel=False)
LAYOUTS = {
    layout.name: layout
    for layout in (
        _layout("ddp", dp_replicate=2),
        _layout("fsdp", dp_shard=2),
        _layout("fsdp_offload", dp_shard=2, engine=NativeEngine(offload_optimizer=True)),
        _layout("hsdp", dp_replicate=2, dp_shard=2),
        _layout("tp", tp=2, engine=_NO_SP),
        _layout("tp_sp", tp=2),
        _layout("tp4_sp", tp=4),
        _layout("cp", cp=2),
        _layout("cp4", cp=4),
        _layout("pp", pp=2),
        _layout("pp_interleaved", pp=2, engine=NativeEngine(pipeline_chunks=2)),
        _layout("ddp_tp", dp_replicate=2, tp=2),
        _layout("fsdp_tp", dp_shard=2, tp=2),
        _layout("fsdp_cp", dp_shard=2, cp=2),
        _layout("fsdp_pp", dp_shard=2, pp=2),
        _layout("cp_tp", cp=2, tp=2),
        _layout("pp_tp", pp=2, tp=2),
        _layout("pp_cp", pp=2, cp=2),
        NamedLayout(name="accelerate", mesh=MeshSpec(dp_replicate=2), engine=AccelerateEngine()),
        *(_zero(DeepSpeedEngine(stage=stage)) for stage in STAGES),
        _zero(DeepSpeedEngine(stage=2, offload_optimizer=True)),
        _zero(DeepSpeedEngine(stage=3, offload_optimizer=True, offload_parameters=True)),
        *(_zero(DeepSpeedEngine(stage=stage), _TENSORS, "_tp") for stage in (1, 2, 3)),
        *(_zero(DeepSpeedEngine(stage=stage), MeshSpec(cp=2), "_ulysses") for stage in (2, 3)),
    )
}


def chosen(names: list[str]) -> list[NamedLayout]:
    """Return the named layouts, or all; ValueError with the nearest name for an unknown one."""
    for name in names:
        if name not in LAYOUTS:
            hint = did_you_mean(name, LAYOUTS)
            raise ValueError(f"layouts={name} is unknown; {hint}Known: {', '.join(LAYOUTS)}")
    return [LAYOUTS[name] for name in names or LAYOUTS]
