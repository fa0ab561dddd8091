"""`tessera verify`: a table of how far every layout lies from one process, on the user's model."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from launch.exit_codes import CHECK_FAILED
from launch.truth import truth
from launch.words import split_off

if TYPE_CHECKING:
    from trainer.verify.verify import Verdict

USAGE = """usage: tessera verify [experiment=NAME] [layouts=[NAME,...]] [key=value] ...

Shrinks the model of the config (same family, ratio of heads and flags), computes it in one process
in fp64, then in every layout over 2 to 4 processes on this machine's CPU: loss, every gradient,
norm, an SGD and an AdamW update, a curve, and a resume from what another layout saved.
Exit code 1 if any layout differs.

  tessera verify experiment=demo                       all layouts
  tessera verify experiment=demo layouts=[tp,fsdp_tp]  some of them
  steps=20                                             length of the curve
  inject=FAULT                                         breaks every layout, which must be found:
                                                       {faults}
  json=true                                            one JSON object per layout

layouts: {layouts}
"""
OWN = {"layouts": "", "inject": "", "json": "false", "steps": "20"}  # options and defaults
COLUMNS = ("loss", "gradients", "norm", "SGD", "AdamW", "curve", "loaded", "resumed")


def main(arguments: list[str]) -> int:
    """Run `tessera verify` and return the exit code."""
    # Its ranks are forked, and CUDA cannot be used in a fork of a process that has seen a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from trainer.verify.faults import FAULTS
    from trainer.verify.layouts import LAYOUTS, chosen

    if "--help" in arguments or "-h" in arguments:
        print(USAGE.format(layouts=", ".join(LAYOUTS), faults=", ".join(FAULTS)), end="")
        return 0
    options, rest = _options(arguments)
    names = [name for name in options["layouts"].strip("[]").split(",") if name]
    layouts = chosen([name.strip() for name in names])
    inject = options["inject"] or None
    if inject is not None and inject not in FAULTS:
        raise ValueError(f"inject={inject} is unknown; set it to one of {', '.join(FAULTS)}")
    small = _small(rest)
    from trainer.verify.verify import verify

    is_json = options["json"] == "true"
    if not is_json:
        _print_head(small)
    show = _print_json if is_json else _print_row
    verdicts = verify(small, layouts, steps=int(options["steps"]), inject=inject, on_verdict=show)
    bad = [verdict for verdict in verdicts if not verdict.passes]
    if not is_json:
        _print_end(verdicts, bad)
    return CHECK_FAILED if bad else 0


def _options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return verify's own options, and the words of the config."""
    given, rest = split_off("verify", arguments, OWN)
    options = OWN | given
    truth("json", options["json"])
    if not options["steps"].isdecimal() or int(options["steps"]) < 5:
        raise ValueError(f"steps={options['steps']} is too short a curve; set it to 5 or more")
    return options, rest


def _small(words: list[str]) -> Any:
    from launch.binding import bind_run
    from launch.compose import compose
    from trainer.verify.shrink import shrink

    return shrink(bind_run(compose(words, command="verify", options=OWN).named))


def _print_head(small: Any) -> None:
    from trainer.verify.compare import CURVE_TOLERANCE, FP32, FP64

    model = small.run.model
    count = sum(parameter.numel() for parameter in small.run.trained_model().parameters())
    print(f"{type(model).__name__} at {count:,} parameters, fp64, against one process")
    for note in small.notes:
        print(f"  changed: {note}")
    limits = (
        f"{FP64.tolerance:.0e} for one step ({FP32.tolerance:.0e} for DeepSpeed, in fp32),\n"
        f"{CURVE_TOLERANCE:.0e} for the curve, 0 for what was loaded"
    )
    if small.run.is_topology_free:
        limits = "0, bit for bit (deterministic=topology_free)"
    print(f"max |a - b| / max |b| of the worst tensor; limits: {limits}\n")
    heads = "".join(f"{name:>10}" for name in COLUMNS)
    print(f"{'layout':<15}{'ranks':>5}{heads}{'s':>7}", flush=True)


def _print_row(verdict: "Verdict") -> None:
    name = f"{verdict.layout.name:<15}{verdict.layout.processes:>5}"
    if verdict.impossible:
        print(f"{name}  not here: {verdict.impossible}", flush=True)
        return
    if verdict.failure:
        print(f"{name}  FAILED", flush=True)
        return
    values = {check.deviation.quantity: check for check in verdict.checks}
    cells = "".join(_cell(values[column]) for column in COLUMNS)
    print(f"{name}{cells}{verdict.seconds:7.1f}", flush=True)


def _cell(check: Any) -> str:
    value = check.deviation.value
    text = "0" if value == 0 else f"{value:.1e}"
    return f"{text if check.passes else '*' + text:>10}"


def _print_end(verdicts: "list[Verdict]", bad: "list[Verdict]") -> None:
    computed = [verdict for verdict in verdicts if not verdict.impossible]
    if not computed:
        print("\nno layout was possible", file=sys.stderr)
        return
    for verdict in bad:
        if verdict.failure:
            print(f"\n{verdict.layout.name}: {verdict.failure}", file=sys.stderr)
            continue
        worst = verdict.worst
        assert worst is not None
        found = worst.deviation
        where = f"{verdict.layout.name}: {found.quantity} of {found.name}"
        print(
            f"{where} differs by {found.value:.3g}, allowed {worst.tolerance:.3g}", file=sys.stderr
        )
    if bad:
        print(f"\n{len(bad)} of {len(computed)} layouts differ", file=sys.stderr)
        return
    worst = max((v.worst for v in computed if v.worst), key=lambda check: check.severity)
    if not any(check.tolerance for verdict in computed for check in verdict.checks):
        print(f"\nall {len(computed)} layouts agree in every bit")
        return
    nearest = f"{worst.deviation.value:.1e} of {worst.tolerance:.0e}"
    where = f"{worst.deviation.quantity}, {worst.deviation.name}"
    print(f"\nall {len(computed)} layouts agree; nearest to its limit: {nearest} ({where})")


def _print_json(verdict: "Verdict") -> None:
    checks = {
        check.deviation.quantity: {
            "deviation": check.deviation.value,
            "tolerance": check.tolerance,
            "worst": check.deviation.name,
        }
        for check in verdict.checks
    }
    row = {
        "layout": verdict.layout.name,
        "processes": verdict.layout.processes,
        "passes": verdict.passes,
        "impossible": verdict.impossible or None,
        "failure": verdict.failure or None,
        "resumed_from": verdict.saved_by or None,
        "seconds": round(verdict.seconds, 2),
        "checks": checks,
    }
    print(json.dumps(row), flush=True)
