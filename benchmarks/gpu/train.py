"""How fast is a step on one GPU, beside the Hugging Face Trainer's in the same run?

    python -m benchmarks.gpu.train                  within ten minutes, on a GPU
    python -m benchmarks.gpu.train only='1b 4096,8b lora 4096' rounds=3 seconds=3600
    python -m benchmarks.gpu.train size=tiny compile=false      any machine: does it run at all?

Each side trains random weights on the same random rows in a fresh process: warm-up steps, timed
steps whose loss the host reads, then (ours) steps in which a host sync is an error. MFU is shown by
two formulas over the dense bf16 peak: 6N + 12LdT, which others publish, and trainer/flops.py, which
knows what is frozen. No MFU on a GPU whose peak trainer/meter.py does not know. A case that a side
cannot run is told of, and the others go on; one that begins after `seconds` is left out.
"""

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks import in_turn
from benchmarks.compare import HEADER, line
from benchmarks.figure import Figure
from benchmarks.gpu.cases import (
    CASES,
    FULL,
    OURS,
    THEIRS_COMPILED,
    TINY,
    Case,
    is_possible,
    rows_of,
    write_run,
)
from benchmarks.gpu.sides import Curve
from benchmarks.in_turn import append_row, machine, read_texts, run_rounds, spread
from launch.exit_codes import BAD_CONFIG, FINISHED
from trainer.meter import PEAKS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu_train.jsonl"
DEFAULTS = {"size": FULL, "only": "", "rounds": "1", "seconds": "480", "compile": "true"}
COLUMNS = (
    "case", "side", "tokens/s", "step, ms", "MFU 6N+12LdT", "MFU ours", "GiB", "retries",
    "recompiles", "host syncs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A side of a case over all rounds."""

    case: Case
    side: str
    curves: list[Curve]
    tokens: int
    """Of a step."""
    peak: float | None
    """FLOP/s of the device."""
    flops: tuple[float, float]
    """Per token, by 6N + 12LdT and by trainer/flops.py."""

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.tokens / median(curve.seconds) for curve in self.curves]

    def mfu(self, flops: float) -> float | None:
        return median(self.rates) * flops / self.peak if self.peak else None

    def cells(self) -> list[str]:
        rate = median(self.rates)
        shares = ["-" if (m := self.mfu(f)) is None else f"{m:.1%}" for f in self.flops]
        watched = [curve for curve in self.curves if curve.is_watched]
        syncs = next((curve.syncs for curve in watched if curve.syncs), "0" if watched else "-")
        return [
            self.case.name, self.side, f"{rate:,.0f}", f"{1000 * self.tokens / rate:.1f}", *shares,
            f"{max(curve.peak_gib for curve in self.curves):.1f}",
            *(self._counts() if self.side == OURS else ("-", "-")), syncs,
        ]  # fmt: skip

    def _counts(self) -> tuple[str, str]:
        retries = sum(curve.retries for curve in self.curves)
        return str(retries), str(sum(curve.recompiles for curve in self.curves))


def main(words: list[str]) -> int:
    """Measure, print, and append a row to results/gpu_train.jsonl; return the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return FINISHED
    try:
        options = read_texts(words, DEFAULTS)
        cases = chosen(options)
    except ValueError as error:
        print(f"gpu.train: {error}", file=sys.stderr)
        return BAD_CONFIG
    deadline = time.monotonic() + float(options["seconds"])
    found: list[Measured] = []
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found += measure(case, Path(folder), options, deadline)
    figures = figures_of(found)
    if options["size"] == TINY:
        print("\nsize=tiny shows that it runs; what follows says nothing about speed")
    print("\n" + HEADER)
    print("\n".join(map(line, figures)))
    if options["size"] == FULL:
        append_row(RESULTS, _row(options, found, figures))
    return FINISHED


def chosen(options: dict[str, str]) -> list[Case]:
    """Return the cases that are asked for; ValueError for an unknown one, or a missing GPU."""
    if options["size"] not in (FULL, TINY):
        raise ValueError(f"size={options['size']} is unknown; set it to {FULL} or {TINY}")
    if options["size"] == FULL and not torch.cuda.is_available():
        raise ValueError("size=full needs a GPU, found none; set size=tiny")
    cases = in_turn.chosen(options["only"], CASES) if options["only"] else CASES
    for name, case in cases.items():
        if not is_possible(case):
            print(f"{name}: not measured, the package torchao is not installed", file=sys.stderr)
    return [case for case in cases.values() if is_possible(case)]


def measure(case: Case, folder: Path, options: dict[str, str], deadline: float) -> list[Measured]:
    """Run the sides of a case in turn, and print a line for each."""
    is_compiled = options["compile"] == "true"
    sides = [side for side in case.sides if is_compiled or side != THEIRS_COMPILED]
    curves: dict[str, list[Curve]] = {side: [] for side in sides}
    run = None
    for number in range(int(options["rounds"])):
        for side in sides:
            if time.monotonic() > deadline:
                print(f"{case.name}, {side}: not measured, time is up", file=sys.stderr)
                continue
            try:
                inputs = folder / f"{number}-{side}"
                run = write_run(case, inputs, size=options["size"], is_compiled=is_compiled)
                (of_sides,) = run_rounds(
                    "benchmarks.gpu.sides", (side,), inputs, rounds=1, threads=2
                )
            except (ValueError, ChildProcessError) as error:
                print(f"{case.name}, {side}: not measured, {error}", file=sys.stderr)
                continue
            curves[side].append(Curve(**of_sides[side]))
    if run is None or not curves[OURS]:
        return []
    first = curves[OURS][0]
    peak = PEAKS.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    found = [
        Measured(
            case=case, side=side, curves=own, peak=peak,
            tokens=rows_of(run) * run.data.row_tokens,
            flops=(first.published_flops, first.flops_per_token),
        )
        for side, own in curves.items() if own
    ]  # fmt: skip
    for one in found:
        print(f"| {' | '.join(one.cells())} |", flush=True)
    return found


def figures_of(found: list[Measured]) -> list[Figure]:
    """Return what is judged: each case by its target, and all of ours by what must not happen."""
    ours = {one.case.name: one for one in found if one.side == OURS}
    figures = [figure for one in ours.values() for figure in _of_case(one, ours, found)]
    watched = [curve for one in ours.values() for curve in one.curves if curve.is_watched]
    if watched:
        counts = {
            "allocator retries": sum(curve.retries for curve in watched),
            "recompiles after warm-up": sum(curve.recompiles for curve in watched),
            "cases with a host sync in a step": sum(bool(curve.syncs) for curve in watched),
        }
        figures += [_upper(name, count, 0) for name, count in counts.items()]
    return figures


def _of_case(one: Measured, ours: dict[str, Measured], found: list[Measured]) -> list[Figure]:
    case, name = one.case, one.case.name
    rivals = [other for other in found if other.case is case and other.side != OURS]
    rival = max(rivals, key=lambda other: median(other.rates), default=None)
    theirs = None if rival is None else spread(rival.rates)
    figures = []
    mfu = one.mfu(one.flops[0])
    if case.least_mfu is not None and mfu is not None:
        figures.append(_lower(f"{name}, MFU by 6N + 12LdT", mfu, case.least_mfu))
    if case.least_tokens is not None:
        rate = median(one.rates)
        figures.append(_lower(f"{name}, tokens/s", rate, case.least_tokens, theirs=theirs))
    if case.most_gib is not None:
        peak = max(curve.reserved_gib for curve in one.curves)
        figures.append(_upper(f"{name}, memory taken, GiB", peak, case.most_gib))
    if case.least_ratio is not None and case.beside in ours:
        ratio = median(one.rates) / median(ours[case.beside].rates)
        figures.append(_lower(f"{name} beside {case.beside}, tokens/s", ratio, case.least_ratio))
    if rival is not None:
        ratio = median(one.rates) / median(rival.rates)
        figures.append(_lower(f"{name} beside {rival.side}, tokens/s", ratio, 1.0))
    return figures


def _lower(
    name: str, value: float, limit: float, *, theirs: dict[str, float] | None = None
) -> Figure:
    return Figure(
        name=name, ours=spread([value]), theirs=theirs, target=f">= {limit:,g}", limit=limit,
        value=value, is_upper=False,
    )  # fmt: skip


def _upper(name: str, value: float, limit: float) -> Figure:
    return Figure(
        name=name, ours=spread([value]), theirs=None, target=f"<= {limit:g}", limit=limit,
        value=value, is_upper=True,
    )  # fmt: skip


def _row(
    options: dict[str, str], found: list[Measured], figures: list[Figure]
) -> dict[str, object]:
    packages = ("torch", "transformers", "accelerate")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": options,
        "machine": machine(),
        "packages": {name: version(name) for name in packages},
        "sides": [dict(zip(COLUMNS, one.cells(), strict=True)) for one in found],
        "figures": [asdict(figure) | {"is_met": figure.is_met} for figure in figures],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
