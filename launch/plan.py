"""`tessera plan`: what a run would cost in memory, work and time, without starting it."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.compose import compose
from launch.exit_codes import CHECK_FAILED, FINISHED
from launch.plan_of_run import note_plan, stored_run
from launch.truth import truth
from launch.words import split_off

if TYPE_CHECKING:
    from launch.probe import Probe
    from trainer.planning.devices import Device
    from trainer.planning.facts import Facts
    from trainer.planning.layouts import Row
    from trainer.planning.memory import Memory
    from trainer.planning.recomputing import Recomputing

USAGE = """usage: tessera plan [experiment=NAME] [group=choice] [key=value] ...

Says what `tessera train` with the same words would need: parameters, batch, FLOPs, checkpoints,
and the memory of the rank that holds most, counted by taking its step on tensors without memory.
Reads no weights, and of the data what labels come from. Exit code 1: the device does not hold it;
then the most activations that may be kept for it to fit are searched for.

  tessera plan experiment=demo
  tessera plan experiment=sft model.path=FOLDER device=h100 processes=8 mesh=fsdp
  device=NAME     {devices}; cpu is this machine
  processes=N     in place of launch.processes
  mfu=0.4         the share of the device's peak that tokens per second and end are reckoned with
  layouts=true    a table: every layout that the run may have on N processes, and which GPU holds it
  probe=true      three real steps on this machine: tokens per second and memory beside the plan
  run=DIR         in place of a config: a run as it was started; kept as DIR/notes/plan.json
  json=true       one JSON object
"""
OWN = ("run", "device", "processes", "mfu", "layouts", "probe", "json")
MFU = 0.4  # what well-tuned runs reach on GPUs; an assumption, and said to be one
MAX_PROCESSES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What belongs to the command, not to the config."""

    device: "Device | None"
    processes: int
    mfu: float
    is_mfu_given: bool
    layouts: bool
    probe: bool
    json: bool


def main(arguments: list[str]) -> int:
    """Run `tessera plan` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        from trainer.planning.devices import DEVICES

        print(USAGE.format(devices=", ".join(DEVICES)), end="")
        return FINISHED
    own, words = split_off("plan", arguments, OWN)
    folder = Path(own["run"]).expanduser() if "run" in own else None
    tree, options = _planned(own, words, folder)
    run = _run(tree)
    from launch import plan_text
    from trainer.planning.facts import facts_of, sized

    device = options.device
    facts = facts_of(run, options.processes, device)
    run = sized(run, device)
    if not options.json:
        plan_text.show_facts(run, facts, options)
    from trainer.planning.memory import memory_of  # imports for a second: behind the first lines

    is_gpu = device is not None and device.name != "cpu"
    memory = memory_of(run, options.processes, is_gpu=is_gpu)
    if not options.json:
        plan_text.show_memory(memory)
    if folder is not None:
        note_plan(folder, facts, memory, device, _rate(run, facts, options))
    rows = _rows(run, options) if options.layouts else []
    probe = _probe(words, options) if options.probe else None
    is_too_large = device is not None and memory.peak > device.memory_gib * 2**30
    if not options.json:
        plan_text.show_end(run, facts, memory, rows, probe, options)
    less = _less(run, memory, options) if is_too_large else None
    if options.json:
        print(json.dumps(_numbers(run, facts, memory, rows, probe, options) | _fitting(less)))
    elif less is not None:
        plan_text.show_recomputing(less)
    return CHECK_FAILED if is_too_large else FINISHED


def _planned(
    own: dict[str, str], words: list[str], folder: Path | None
) -> tuple[dict[str, Any], Options]:
    """Return the config that is planned, and how."""
    if folder is None:
        tree = compose(words, command="plan", options=OWN).named
        return tree, _options(own, tree)
    tree, processes = stored_run(folder, words)
    options = _options({"processes": str(processes)} | own, tree)
    if options.probe:
        raise ValueError("probe=true trains a config's words; give them in place of run=DIR")
    return tree, options


def _options(own: dict[str, str], tree: dict[str, Any]) -> Options:
    from trainer.planning.devices import device

    processes = _processes(own.get("processes"), tree)
    return Options(
        device=device(own["device"], processes) if "device" in own else None,
        processes=processes, mfu=_mfu(own.get("mfu", str(MFU))), is_mfu_given="mfu" in own,
        **{key: truth(key, own.get(key, "false")) for key in ("layouts", "probe", "json")},
    )  # fmt: skip


def _processes(given: str | None, tree: dict[str, Any]) -> int:
    """Return the ranks to plan for: as many as `launch` starts, though it need not be able to."""
    if given is None:
        from launch.binding import convert
        from launch.protocol import Launch

        launch: Launch = convert(tree["launch"], Launch, "launch")
        return launch.world_size
    if not given.isdecimal() or not 1 <= int(given) <= MAX_PROCESSES:
        raise ValueError(f"processes={given} is no number of processes; set it to 1 or more")
    return int(given)


def _mfu(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"mfu={text} is no share of a peak; set it above 0, and to 1 at most")
    return value


def _run(tree: dict[str, Any]) -> Any:
    from launch.binding import bind_run
    from trainer.run import Run

    run = bind_run(tree)
    assert isinstance(run, Run)
    return run


def _rows(run: Any, options: Options) -> "list[Row]":
    from trainer.planning.layouts import rows_of

    rows = []
    for row in rows_of(run, options.processes):
        rows.append(row)
        if not options.json and sys.stderr.isatty():
            print(f"planned {row.name}", file=sys.stderr)
    return rows


def _rate(run: Any, facts: "Facts", options: Options) -> float:
    """Return the tokens per second of a device; 0: none is given, or it states no peak."""
    device = options.device
    return facts.tokens_per_second(run, device, options.mfu, options.processes) if device else 0.0


def _probe(words: list[str], options: Options) -> "Probe":
    from launch.probe import probe

    return probe(words, options.processes)


def _less(run: Any, memory: "Memory", options: Options) -> "Recomputing | None":
    from trainer.planning.recomputing import least_recomputing

    device = options.device
    assert device is not None
    return least_recomputing(
        run, options.processes, memory, device.memory_gib * 2**30, is_gpu=device.name != "cpu"
    )


def _fitting(less: "Recomputing | None") -> dict[str, Any]:
    """Return the budget that fits, and its peak; without one, the peak when all is recomputed."""
    return {"budget": less and less.budget, "budget_peak": less and less.memory.peak}


def _numbers(
    run: Any,
    facts: "Facts",
    memory: "Memory",
    rows: "list[Row]",
    probe: "Probe | None",
    options: Options,
) -> dict[str, Any]:
    """Return the plan as one JSON object; sizes in bytes."""
    device = options.device
    rate = _rate(run, facts, options)
    return {
        "processes": options.processes,
        **{key: value for key, value in asdict(facts).items() if key != "flops"},
        "flops_per_token": facts.flops.per_token,
        "flops": facts.flops.describe(),
        "memory": asdict(memory),
        "device": asdict(device) if device else None,
        "fits": memory.peak <= device.memory_gib * 2**30 if device else None,
        "mfu": options.mfu if rate else None,
        "tokens_per_second": rate or None,
        "layouts": [
            {"name": r.name, "peak": r.memory and r.memory.peak, "problem": r.problem or None}
            for r in rows
        ],
        "probe": asdict(probe) if probe else None,
    }
