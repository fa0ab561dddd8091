"""One case, in a process of its own: steps as they are, then one counted and some profiled.

python -m benchmarks.roofline.measure CASE FOLDER OUTPUT THREADS PRECISION COMPILE
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.roofline.cases import CASES
from benchmarks.roofline.ceilings import typical
from benchmarks.roofline.traffic import Product, Traffic
from benchmarks.starts import start_in
from trainer.callbacks.protocol import Callback, RunView
from trainer.construct import fit
from trainer.progress import Progress

WARMUP, TIMED, ROUNDS, PROFILED = 3, 3, 3, 2
STEPS = WARMUP + 1 + TIMED * ROUNDS + PROFILED
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product",),
    "optimizer": ("_fused_adamw", "linalg_vector_norm", "_foreach"),
    "copies and casts": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_", "index"),
    "softmax of the head": ("_softmax", "amax", "scatter_add_", "gather"),
}
"""By how the name of an operation begins; what is none of these is `element by element`."""
REST = "element by element"


@dataclass(kw_only=True)
class Found:
    """Seconds, bytes and FLOPs of one step."""

    seconds: float = 0.0
    """Median over the timed steps."""
    step_seconds: list[float] = field(default_factory=list)
    """Each of them."""
    product_seconds: float = 0.0
    """Of the step's own products one by one: each shape's median of the rounds."""
    flops: int = 0
    num_bytes: int = 0
    calls: int = 0
    data_wait: float = 0.0
    """The largest share of a step without the next batch."""
    kinds: dict[str, float] = field(default_factory=dict)
    """Of operations, under the profiler."""
    profiled_seconds: float = 0.0
    trained: int = 0
    """Numbers that the optimizer updates."""


class Observer(Callback):
    """Looks at a step after another; times nothing that it does itself."""

    def __init__(self) -> None:
        self.found = Found()
        self._plan = self._looks()

    def build(self) -> "Observer":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        next(self._plan)

    def on_step(self, progress: Progress, metrics: dict[str, Any]) -> None:
        self._plan.send(metrics)

    def _looks(self) -> Generator[None, dict[str, Any]]:
        for _ in range(WARMUP):
            yield
        traffic = Traffic()
        with traffic:
            yield
        found = self.found
        found.flops, found.num_bytes, found.calls = traffic.flops, traffic.num_bytes, traffic.calls
        found.trained = traffic.trained
        products = [(product, *_factors(product)) for product in traffic.products]
        seconds: list[float] = []
        rounds: dict[Product, list[float]] = {product: [] for product in traffic.products}
        for _ in range(ROUNDS):
            for _ in range(TIMED):
                start = time.perf_counter()
                metrics = yield
                seconds.append(time.perf_counter() - start)
                found.data_wait = max(found.data_wait, metrics["data_wait_fraction"])
            for product, left, right in products:
                rounds[product].append(typical(partial(torch.matmul, left, right)))
        found.seconds, found.step_seconds = median(seconds), seconds
        counts = traffic.products
        found.product_seconds = sum(counts[p] * median(times) for p, times in rounds.items())
        yield from self._profiled()
        yield

    def _profiled(self) -> Generator[None, dict[str, Any]]:
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(PROFILED):
                yield
        self.found.profiled_seconds = (time.perf_counter() - start) / PROFILED
        kinds: Counter[str] = Counter()
        for event in profiled.key_averages():
            kinds[_kind(event.key)] += event.self_cpu_time_total / 1e6 / PROFILED
        self.found.kinds = dict(kinds)


def _kind(name: str) -> str:
    if not name.startswith("aten::"):
        return "Python and autograd"
    own = name.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if own.startswith(starts)), REST)


def _factors(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the same shapes, strides and dtype."""
    made = []
    for shape, stride in (product.left, product.right):
        size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        made.append(torch.randn(size).to(product.dtype).as_strided(shape, stride))
    return made[0], made[1]


def main() -> None:
    """Measure one case; leave what was found."""
    name, folder, output, threads, precision, compiled = sys.argv[1:]
    torch.set_num_threads(int(threads))
    run: Any = CASES[name].run(Path(folder), STEPS, precision=precision)
    observer = Observer()
    run = replace(run, callbacks={"observer": observer})
    if compiled == "true":
        run = replace(run, engine=replace(run.engine, compile=True))

    fit(run, start_in(Path(output) / "run"))
    (Path(output) / "found.json").write_text(json.dumps(asdict(observer.found)))


if __name__ == "__main__":
    main()
