"""From the curves of all rounds to the comparison's figures, and from those to lines for people."""

from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.in_turn import show, spread
from benchmarks.train_step_sides import Curve

NAMES = {
    "ours": "Tessera",
    "theirs": "transformers.Trainer",
    "ours_compiled": "Tessera, compiled",
    "theirs_compiled": "transformers.Trainer, compiled",
}
PAIRS = (("ours", "theirs"), ("ours_compiled", "theirs_compiled"))
METHODS = {
    "fp32": "one method on both sides: expect about 1e-6 in early steps, rounding grows from there",
    "bf16": "the methods differ, expect about 1e-3: ours casts the weights, so that residuals are "
    "bf16 too; theirs is autocast, which keeps weights, norms and residuals in fp32",
}


def summarise(
    rounds: list[dict[str, Curve]], *, tokens: int, warmup: int, precision: str
) -> dict[str, Any]:
    """Return each side's figures, their ratios and the distance of the curves, as plain values.

    `tokens` are those of a step. Of each round counts the median of its steps after `warmup`.
    """
    summary: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    for side in rounds[0]:
        curves = [curves[side] for curves in rounds]
        seconds[side] = [median(_steps(curve, warmup)) for curve in curves]
        summary[side] = {
            "step_ms": spread([1000 * value for value in seconds[side]]),
            "fastest_step_ms": round(1000 * min(t for c in curves for t in _steps(c, warmup)), 4),
            "tokens_per_second": spread([tokens / value for value in seconds[side]]),
            "peak_gib": spread([curve.peak_gib for curve in curves]),
            "held_before_step_1_gib": spread([curve.held_gib for curve in curves]),
            "first_and_last_loss": [curves[0].losses[0], curves[0].losses[-1]],
        }
    summary["comparisons"] = {
        f"{one} / {other}": _comparison(rounds, seconds, one, other)
        for one, other in PAIRS
        if one in seconds and other in seconds
    }
    summary["method"] = METHODS[precision]
    return summary


def _comparison(
    rounds: list[dict[str, Curve]], seconds: dict[str, list[float]], one: str, other: str
) -> dict[str, Any]:
    """Return how much faster `one` is than `other` in each round, and how far their losses are."""
    pairs = zip(seconds[one], seconds[other], strict=True)
    differences = [_differences(curves[one], curves[other]) for curves in rounds]
    return {
        "speed_ratio": spread([theirs / ours for ours, theirs in pairs]),
        "loss_difference_step_1": max(of_round[0] for of_round in differences),
        "loss_difference_all_steps": max(map(max, differences)),
    }


def _steps(curve: Curve, warmup: int) -> list[float]:
    """Return the seconds of each step after `warmup`."""
    return [stop - start for start, stop in pairwise(curve.stamps[warmup - 1 :])]


def _differences(ours: Curve, theirs: Curve) -> list[float]:
    """Return |ours - theirs| / theirs of every step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)]


def report(row: dict[str, Any]) -> str:
    """Return a result row as text."""
    settings, comparisons = row["settings"], row["comparisons"]
    return "\n".join(
        (
            *_header(row),
            *(_side(name, row[side]) for side, name in NAMES.items() if side in row),
            *(_ratio(row, pair) for pair in comparisons),
            f"(losses over {settings['steps']} steps; {row['method']})",
        )
    )


def _ratio(row: dict[str, Any], pair: str) -> str:
    found, (one, _, other) = row["comparisons"][pair], pair.partition(" / ")
    fastest = row[other]["fastest_step_ms"] / row[one]["fastest_step_ms"]
    return (
        f"{NAMES[one]} beside {NAMES[other]}: speed {show(found['speed_ratio'], 3)}, "
        f"by fastest steps {fastest:.3f}; losses differ by {found['loss_difference_step_1']:.1e} "
        f"at step 1, {found['loss_difference_all_steps']:.1e} at most"
    )


def _header(row: dict[str, Any]) -> tuple[str, str, str]:
    settings, machine = row["settings"], row["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in row["packages"].items())
    return (
        f"{' '.join(settings['model'])} ({row['parameters'] / 1e6:.2f} M parameters), "
        f"{settings['precision']}, {settings['rows']} rows x {settings['row_tokens']} tokens; "
        f"steps {settings['warmup'] + 1} to {settings['steps']} are timed",
        f"{machine['cpu']}, {machine['cpus']} cores, {settings['threads']} threads; {packages}",
        f"{'median [min - max]':<30}{'ms per step':^28}{'tokens/s':^24}peak GiB  before step 1",
    )


def _side(name: str, figures: dict[str, Any]) -> str:
    peak, held = figures["peak_gib"]["median"], figures["held_before_step_1_gib"]["median"]
    step, speed = show(figures["step_ms"], 1), show(figures["tokens_per_second"], 0)
    return f"{name:<30}{step:^28}{speed:^24}{peak:>8.2f}{held:>15.2f}"
