"""Two tables: each case beside its floor, and where its time goes."""

from typing import Any

from benchmarks.roofline.measure import KINDS, REST

PARTS = (*KINDS, REST, "Python and autograd")


def lines(row: dict[str, Any]) -> list[str]:
    """Return both tables, and what was measured on what."""
    options, limits = row["options"], row["ceilings"]
    cpu = row["machine"]["cpu"]
    speeds = "; ".join(
        f"{threads} thread{'s' if int(threads) > 1 else ''}: {limit['fp32'] / 1e12:.2f} TFLOP/s "
        f"in fp32, {limit['bf16'] / 1e12:.2f} in bf16, {limit['memory'] / 1e9:.1f} GB/s"
        for threads, limit in limits.items()
    )
    return [
        f"{cpu}, {options['threads']} threads, {options['precision']}. Ceilings with {speeds}.",
        "",
        "| step | GFLOP | GB moved | calls | floor, ms | own products, ms | step, ms | share |",
        "|---|---|---|---|---|---|---|---|",
        *(_cost(name, case) for name, case in row["cases"].items()),
        "",
        "| share of a profiled step | " + " | ".join(PARTS) + " |",
        "|---|" + "---|" * len(PARTS),
        *(_shares(name, case) for name, case in row["cases"].items()),
    ]


def _cost(name: str, case: dict[str, Any]) -> str:
    numbers = (
        f"{case['flops'] / 1e9:.0f}", f"{case['num_bytes'] / 1e9:.1f}", str(case["calls"]),
        f"{case['floor'] * 1e3:.0f}", f"{case['product_seconds'] * 1e3:.0f}",
        f"{case['seconds'] * 1e3:.0f}", f"{case['product_seconds'] / case['seconds']:.0%}",
    )  # fmt: skip
    return f"| {name} | " + " | ".join(numbers) + " |"


def _shares(name: str, case: dict[str, Any]) -> str:
    total = sum(case["kinds"].values())
    return (
        f"| {name} | "
        + " | ".join(f"{case['kinds'].get(k, 0.0) / total:.0%}" for k in PARTS)
        + " |"
    )
