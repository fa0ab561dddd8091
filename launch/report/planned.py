"""What `tessera plan` said of a run beside what the run came to: RUN/notes/plan.json."""

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from launch.report.history import History, part
from trainer.page import table
from trainer.sizes import in_memory

_FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))


def planned(history: History) -> str:
    """Return a table of what was predicted and what was measured; nothing without a plan."""
    plan = history.plan
    rows = [
        [name, said, measured, _off(predicted, found)]
        for name, predicted, found, said, measured in _pairs(plan, history)
    ]
    if not rows:
        return ""
    heads = ["", "predicted", "measured", "difference"]
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in _notes(plan, history))
    shown = table("By tessera plan, and by the run", heads, rows)
    return f'<div class="wide numbers" tabindex="0">{shown}</div>{notes}'


def _pairs(plan: dict[str, Any], history: History) -> Iterator[tuple[str, float, float, str, str]]:
    """Yield a name, both numbers (NaN: not known), and both as they are shown."""
    train = history.points.train
    whole = {"steps": float(history.last_step), "tokens": train.last("tokens")}
    if (peak := _known(plan, "peak_bytes")) is not None:
        held = measured_bytes(history)
        yield "memory of a rank at its peak", peak, held, in_memory(peak), _shown(held, in_memory)
    for name, found in whole.items():
        if (count := _known(plan, name)) is not None:
            yield name, count, found, f"{count:,.0f}", _shown(found, "{:,.0f}".format)
    speed = history.points.speed
    measured = math.nan if speed is None else speed
    if (rate := _known(plan, "tokens_per_second")) is not None:
        yield "tokens/s", rate, measured, f"{rate:,.0f}", _shown(measured, "{:,.0f}".format)
    if (each := _known(plan, "flops_per_token")) is not None:
        done = _shown(each * measured, lambda flops: f"{_flops(flops)}/s, all ranks")
        shares = train.series("mfu")[1]
        used = f", MFU {sum(shares) / len(shares):.1%}" if shares else ""
        yield "work", math.nan, math.nan, f"{_flops(each)} per token", f"{done}{used}"


def measured_bytes(history: History) -> float:
    """Return the most that rank 0 held: of a GPU's allocator, or what the process grew by."""
    most = max(history.points.train.series("memory_gib")[1], default=math.nan) * 2**30
    return most - history.about.get("host_bytes_before", 0)


def _notes(plan: dict[str, Any], history: History) -> Iterator[str]:
    parts = {name: _known(part(plan, "bytes"), name) for name in part(plan, "bytes")}
    found = sorted(((n, b) for n, b in parts.items() if b), key=lambda each: -each[1])
    if found:
        yield f"Predicted memory: {', '.join(f'{name} {in_memory(held)}' for name, held in found)}."
    if "host_bytes_before" in history.about:
        yield (
            "Measured memory on a CPU is what the process of rank 0 grew by: it holds what glibc "
            "and the libraries keep, too, which no plan counts."
        )
    else:
        yield "Measured memory is the most that the GPU's allocator gave to rank 0."
    if device := plan.get("device"):
        yield f"Predicted for {device}."


def _known(plan: dict[str, Any], name: str) -> float | None:
    """Return a number of the plan that can be one; None for anything else."""
    value = plan.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e300 else None


def _off(predicted: float, found: float) -> str:
    """Return by how much the measured number is more or less than the predicted one."""
    if not (predicted > 0 and math.isfinite(found)):
        return ""
    share = found / predicted - 1
    return "none" if not share else f"{share:+.1%}"


def _shown(value: float, how: Any) -> str:
    return str(how(value)) if math.isfinite(value) else "not known"


def _flops(value: float) -> str:
    unit, name = next((u, n) for u, n in _FLOPS if value >= u or u == 1.0)
    return f"{value / unit:.3g} {name}s"
