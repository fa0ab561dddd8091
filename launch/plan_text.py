"""A plan on the terminal: aligned, one screen, each number with where it is from."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from trainer.planning.devices import DEVICES, TABLE
from trainer.sizes import in_memory, on_disk

if TYPE_CHECKING:  # memory imports torch's fake tensors: over a second, behind the first lines
    from launch.plan import Options
    from launch.probe import Probe
    from trainer.planning.facts import Facts
    from trainer.planning.layouts import Row
    from trainer.planning.memory import Memory
    from trainer.planning.recomputing import Recomputing

GIB = 1 << 30
WIDTH = 19


def show_facts(run: Any, facts: "Facts", options: "Options") -> None:
    """Print what the config alone says."""
    model = type(getattr(run.model, "spec", run.model)).__name__.removesuffix("Spec")
    ranks = f"{options.processes} process{'es' * (options.processes > 1)}"
    print(f"plan of {run.name}: {model} on {ranks}, {_mesh(facts)}, precision {run.precision}\n")
    total = facts.trainable + facts.frozen
    _line("parameters", f"{total:,}: {facts.trainable:,} trainable, {facts.frozen:,} frozen")
    _line("batch", _batch(facts, options.processes))
    _line("length", _length(facts))
    _line("FLOPs", facts.flops.describe())
    _line(
        "checkpoint",
        f"{on_disk(facts.checkpoint)}: weights {on_disk(facts.checkpoint_weights)}, optimizer "
        f"{on_disk(facts.checkpoint_state)}; saved {facts.saves}",
    )
    print(flush=True)


def show_memory(memory: "Memory") -> None:
    """Print the memory of a rank by what it is."""
    where = f"rank {memory.rank} holds most, in the {memory.phase} pass of a step of full rows"
    if memory.phase == "update":
        where = f"rank {memory.rank} holds most, in the update"
    print(f"memory of a rank: {where}")
    for name, held in memory.by_category.items():
        print(f"  {name:<{WIDTH}}{in_memory(held, 2):>11}  {held / memory.peak:>4.0%}")
    print(f"  {'in all':<{WIDTH}}{in_memory(memory.peak, 2):>11}")
    if memory.host:
        print(f"  {'in host memory':<{WIDTH}}{in_memory(memory.host, 2):>11}")
    print(flush=True)


def show_end(
    run: Any,
    facts: "Facts",
    memory: "Memory",
    rows: "list[Row]",
    probe: "Probe | None",
    options: "Options",
) -> None:
    """Print table, time and verdict."""
    if rows:
        _show_layouts(rows, options.processes)
    rate, origin = _rate(run, facts, probe, options)
    if probe is not None:
        print(
            f"probe: {probe.tokens_per_second:,.0f} tokens/s here, "
            f"{probe.memory_gib:.2f} GiB held at most where the plan has {memory.peak / GIB:.2f} "
            "(on a CPU the process and its libraries come on top)"
        )
    if rate:
        print(f"speed: {rate:,.0f} tokens/s, {origin}{_end(facts, rate)}")
    print(_verdict(memory, options), flush=True)


def show_recomputing(less: "Recomputing") -> None:
    """Print with how much computed again it fits, or that it does not."""
    key, held = "engine.activation_checkpointing", f"{less.memory.peak / GIB:.1f} GiB"
    if less.budget is None:
        print(f"nor with all blocks computed again ({key}.mode=full): {held}")
    else:
        print(f"fits with {key}.mode=budget {key}.budget={less.budget:g}: {held}")


def _line(name: str, text: str) -> None:
    print(f"{name:<12} {text}")


def _mesh(facts: "Facts") -> str:
    used = [f"{axis} {length}" for axis, length in facts.mesh.items() if length > 1]
    why = f" (mesh=auto: {facts.why})" if facts.why else ""
    return (" x ".join(used) or "no axis") + why


def _batch(facts: "Facts", processes: int) -> str:
    data = facts.mesh["dp_replicate"] * facts.mesh["dp_shard"]
    one = f"micro-batches of {facts.micro_rows} row{'s' * (facts.micro_rows > 1)}"
    many = "as many as the documents of a step fill" if facts.micro_batches is None else (
        f"{facts.micro_batches} accumulated"
    )  # fmt: skip
    most = "" if facts.is_exact else "at most "
    return (
        f"{facts.global_samples:,} {facts.unit} of {most}{facts.row_tokens:,} tokens a step = "
        f"{data} data rank{'s' * (data > 1)} x {one}, {many}"
    )


def _length(facts: "Facts") -> str:
    most = "" if facts.is_exact else "at most "
    each = f"{most}{facts.step_tokens:,} tokens a step"
    if facts.steps is None:
        return f"{each}; how many steps max_epochs makes, the data will say: set max_steps"
    return f"{facts.steps:,} steps x {each} = {most}{facts.steps * facts.step_tokens:,} tokens"


def _rate(run: Any, facts: "Facts", probe: "Probe | None", options: "Options") -> tuple[float, str]:
    """Return tokens per second, and where the number is from."""
    if probe is not None and (options.device is None or options.device.name == "cpu"):
        return probe.tokens_per_second, "as three real steps went on this machine"
    device = options.device
    rate = facts.tokens_per_second(run, device, options.mfu, options.processes) if device else 0.0
    if device is None or not rate:
        return 0.0, ""
    kind = "given" if options.is_mfu_given else "assumed; mfu=... sets it"
    return rate, f"at an MFU of {options.mfu:.0%} ({kind}) of the peak in the {device.source}"


def _end(facts: "Facts", rate: float) -> str:
    if facts.steps is None:
        return ""
    took = timedelta(seconds=round(facts.steps * facts.step_tokens / rate))
    try:
        end = f"{datetime.now().astimezone() + took:%Y-%m-%d %H:%M}"
    except OverflowError:
        end = "never"
    return f"; {took} for all steps, started now they end {end}"


def _verdict(memory: "Memory", options: "Options") -> str:
    device = options.device
    if device is None:
        return (
            f"needs {in_memory(memory.peak, 2)} per rank; device=h100 (or another) says if it fits"
        )
    held, has = memory.peak / GIB, device.memory_gib
    numbers = f"{held:.1f} of {has:.1f} GiB per rank, {held / has:.0%}"
    note = "; what CUDA and its allocator take comes on top" if device.name != "cpu" else ""
    if held > has:
        return f"does not fit: {numbers}; layouts=true shows what would"
    return f"fits: {numbers} ({device.name}){note}"


def _show_layouts(rows: "list[Row]", processes: int) -> None:
    """Print which layout fits which device."""
    print(f"layouts on {processes} processes, GiB per rank; - does not fit")
    heads = "".join(f"{name:>10}" for name in TABLE)
    sizes = "".join(f"{DEVICES[name].memory_gib:>10.1f}" for name in TABLE)
    print(f"  {'layout':<14}{heads}\n  {'GiB':<14}{sizes}")
    for row in rows:
        if row.memory is not None:
            held = row.memory.peak / GIB
            cells = "".join(f"{_cell(held, DEVICES[name].memory_gib):>10}" for name in TABLE)
            print(f"  {row.name:<14}{cells}")
    for row in rows:
        if row.memory is None:
            print(f"  {row.name}: {row.problem}")
    print()


def _cell(held: float, has: float) -> str:
    return f"{held:.1f} {'fits' if held <= has else '-'}"
