"""What the config alone says: parameters, batch, work, and what a checkpoint weighs."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from trainer.adapters.protocol import NoAdapter
from trainer.auto_mesh import AutoMesh
from trainer.checkpoint.contents import is_trained_alone
from trainer.checkpoint.interval import GPU_HOURS_PER_FAILURE
from trainer.checkpoint.spec import AUTO_INTERVAL
from trainer.flops import Flops, training_flops
from trainer.optimizers.rules import Rules
from trainer.parallel.pieces import unique_parameters
from trainer.planning.any_machine import without_float8
from trainer.planning.devices import Device
from trainer.planning.rows import micro_rows_of
from trainer.precision import PRECISIONS
from trainer.run import Run


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Numbers of a run on so many processes; sizes in bytes."""

    mesh: dict[str, int]
    why: str
    """Why mesh=auto came to it."""
    trainable: int
    """In the last phase, as `frozen` and all that follows."""
    frozen: int
    unit: str
    """rows or documents."""
    global_samples: int
    """Of an optimizer step."""
    row_tokens: int
    micro_rows: int
    micro_batches: int | None
    """Of a rank and step; None: it varies with the lengths of documents."""
    step_tokens: int
    """At most: all rows full; of documents each in a row of its own."""
    steps: int | None
    """None: max_epochs, which the data has to be made for."""
    flops: Flops
    checkpoint_weights: int
    checkpoint_state: int
    saves: str

    @property
    def is_exact(self) -> bool:
        """Whether each step has so many tokens, padding included, and not fewer."""
        return self.unit == "rows"

    @property
    def checkpoint(self) -> int:
        return self.checkpoint_weights + self.checkpoint_state

    def tokens_per_second(self, run: Run, device: Device, mfu: float, processes: int) -> float:
        """Return what `mfu` of the devices' peak makes; 0: they have none in this precision."""
        peak = device.peak(PRECISIONS[run.precision])
        images = getattr(run.data, "row_images", 0) / self.row_tokens
        work = self.flops.of(tokens=1, onlookers=1 if images else 0, images=images)
        return mfu * peak * processes / work if peak else 0.0


def facts_of(run: Run, processes: int, device: Device | None) -> Facts:
    """Return the facts; ValueError as `tessera train` has it for what is not possible.

    Data is looked at where labels come from it, and not otherwise.
    """
    run = without_float8(sized(run, device))
    spec, why = run.chosen_mesh(processes)
    axes = spec.axes(processes)
    dp_size = axes["dp_replicate"] * axes["dp_shard"]
    model, data = run.trained_model(run.freeze.last_phase), run.data
    micro_batches = data.micro_batches(dp_size)
    run.check_optimizer(model, axes)
    run.engine.check(
        model, run.model.layout, axes, row_tokens=data.row_tokens, micro_batches=micro_batches,
        precision=PRECISIONS[run.precision],
    )  # fmt: skip
    parameters = dict(unique_parameters(model))
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    samples, unit = _samples(data)
    weights, state = _checkpoint(run, parameters, run.rules(model))
    return Facts(
        mesh=axes, why=why, trainable=trainable,
        frozen=sum(p.numel() for p in parameters.values()) - trainable,
        unit=unit, global_samples=samples, row_tokens=data.row_tokens,
        micro_rows=micro_rows_of(run, dp_size), micro_batches=micro_batches,
        step_tokens=samples * data.row_tokens, steps=run.max_steps,
        flops=training_flops(model, run.model.layout, run.model.attention_width, data.row_tokens),
        checkpoint_weights=weights, checkpoint_state=state, saves=_saves(run, processes),
    )  # fmt: skip


def sized(run: Run, device: Device | None) -> Run:
    """Return the run whose mesh=auto chooses for the memory of a device."""
    if isinstance(run.mesh, AutoMesh) and device is not None and run.mesh.memory_gib is None:
        return replace(run, mesh=replace(run.mesh, memory_gib=device.memory_gib))
    return run


def _samples(data: Any) -> tuple[int, str]:
    """Return what makes an optimizer step, and its unit."""
    if hasattr(data, "global_rows"):
        return data.global_rows, "rows"
    return data.global_documents, "documents"


def _checkpoint(run: Run, parameters: dict[str, nn.Parameter], rules: Rules) -> tuple[int, int]:
    """Return the bytes of weights, and of optimizer state, that a save writes."""
    is_alone = not isinstance(run.adapter, NoAdapter) or is_trained_alone(
        run.checkpoint.contents, new_tokens=run.freeze.new_tokens
    )
    saved = [p for p in parameters.values() if p.requires_grad or not is_alone]
    weights = sum(p.numel() * p.element_size() for p in saved)
    state = sum(
        run.optim.state_bytes(name, tuple(p.shape), p.dtype, rules)
        for name, p in parameters.items()
        if p.requires_grad
    )
    return weights, state


def _saves(run: Run, processes: int) -> str:
    """Return when a run saves."""
    spec = run.checkpoint
    kept = f", the newest {spec.keep} stay"
    if spec.interval == AUTO_INTERVAL:
        hours = spec.mtbf_hours or GPU_HOURS_PER_FAILURE / processes
        return f"by the measured cost of a save and a failure every {hours:,.0f} h{kept}"
    if spec.interval is not None:
        return f"every {spec.interval:g} s{kept}"
    if run.save_every is None:
        return "at the last step"
    return f"every {run.save_every:,} steps{kept}"
