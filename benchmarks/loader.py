"""Does the loader keep up? Tokens per second, waiting, a virtual corpus of 10 T tokens, packing.

    python -m benchmarks.loader        prints one line per figure; appends to results/loader.jsonl

The virtual corpus is 2,000 names of one file: 5e9 tokens that are a hole, with the borders of 5 M
documents. Rows of 5 tokens make 2e12 samples of it. What is packed are 5 M lengths, log-normal like
those of web pages (median 550, 1 % cut at 8,192). Exit code 1: a figure missed its target.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np

from trainer.data.folder_writer import FolderWriter
from trainer.data.loader import StepLoader
from trainer.data.packing import best_fit
from trainer.data.prefetch import Ahead
from trainer.data.rows import PackedRows
from trainer.data.shard_writer import seal
from trainer.data.shards import BLOCK_BYTES, HEADER, Section, Shard, Vocabulary
from trainer.data.tokens import Entry, Index, Part, TokenStore

RESULTS = Path(__file__).parent / "results" / "loader.jsonl"
TARGET_RATE = 4e6  # tokens per second of one node
VOCABULARY = Vocabulary(tokenizer="none", vocab_size=50_000, bos_token_id=None, eos_token_id=0)
VIRTUAL_SHARDS, VIRTUAL_TOKENS, VIRTUAL_DOCUMENTS = 2000, 5 * 10**9, 5 * 10**6


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value and its target."""

    name: str
    value: float
    unit: str
    target: float
    is_limit: bool
    """Whether the value has to stay below the target."""

    @property
    def passes(self) -> bool:
        return self.value <= self.target if self.is_limit else self.value >= self.target


def main() -> int:
    """Measure, print and store all figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_real(folder / "real", num_documents=50_000)
        figures = [*_throughput(folder / "real"), _checking(folder / "real")]
        write_virtual(folder / "virtual")
        figures += [*_virtual(folder / "virtual"), *_packing()]
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    with open(RESULTS, "a", encoding="utf-8") as file:
        for figure in figures:
            sign = "<=" if figure.is_limit else ">="
            verdict = "" if figure.passes else "   MISSED"
            print(
                f"{figure.name:<72}{figure.value:>14,.4g} {figure.unit:<9} "
                f"{sign} {figure.target:,.4g}{verdict}"
            )
            file.write(json.dumps(asdict(figure) | {"passes": figure.passes, **machine}) + "\n")
    return int(not all(figure.passes for figure in figures))


def write_real(folder: Path, num_documents: int) -> None:
    """Write documents of log-normal length, 1.1 k tokens on average."""
    folder.mkdir()
    writer = FolderWriter(folder, VOCABULARY, shard_tokens=1 << 24)
    generator = np.random.default_rng(0)
    pool = generator.integers(1, VOCABULARY.vocab_size, 1 << 20)
    for length in generator.lognormal(6.5, 1.0, num_documents).astype(int).clip(1, 1 << 19):
        start = int(generator.integers(0, len(pool) - length))
        writer.add("train", pool[start : start + length], 0)
    writer.finish()


def write_virtual(
    folder: Path,
    num_shards: int = VIRTUAL_SHARDS,
    num_tokens: int = VIRTUAL_TOKENS,
    num_documents: int = VIRTUAL_DOCUMENTS,
) -> None:
    """Write one file with a hole for its tokens, and give it `num_shards` names."""
    folder.mkdir()
    first = folder / "train-00000.shard"
    starts = np.arange(num_documents + 1, dtype="<i8") * (num_tokens // num_documents)
    tokens = Section(name="tokens", dtype="<u2", offset=HEADER.size, count=num_tokens)
    borders = Section(name="starts", dtype="<i8", offset=tokens.stop, count=len(starts))
    with open(first, "wb") as file:
        file.seek(tokens.stop)
        file.write(starts.tobytes())
        hashes = np.zeros(-(-(borders.stop - HEADER.size) // BLOCK_BYTES), "<u8")
        footer = seal(
            file, [tokens, borders], hashes, num_documents=num_documents, num_bytes=0,
            vocabulary=VOCABULARY,
        )  # fmt: skip
    paths = [folder / f"train-{number:05d}.shard" for number in range(num_shards)]
    for path in paths[1:]:
        os.link(first, path)
    entries = [Entry.of(path, footer) for path in paths]
    Index(vocabulary=VOCABULARY, stores={"train": entries}).write(folder)


def open_loader(
    folder: Path, row_tokens: int, global_rows: int, micro_rows: int, num_ranks: int = 1
) -> StepLoader:
    """Return the loader of the last of `num_ranks` ranks."""
    rows = PackedRows(TokenStore(Part(folder, "train")), row_tokens)
    return StepLoader(
        rows=rows, seed=0, global_samples=global_rows, micro_rows=micro_rows,
        rank=num_ranks - 1, num_ranks=num_ranks,
    )  # fmt: skip


def _throughput(folder: Path) -> list[Figure]:
    """Measure one process: alone, then beside a step of 4 M tokens per second that only waits."""
    figures = []
    for row_tokens in (512, 4096):
        tokens = 1 << 20
        loader = open_loader(folder, row_tokens, tokens // row_tokens, 8)
        seconds = []
        for step in range(12):
            started = time.perf_counter()
            loader.step(step)
            seconds.append(time.perf_counter() - started)
        name = f"loader alone, rows of {row_tokens:,} tokens, one process"
        rate = tokens / median(seconds[2:])
        figures.append(
            Figure(name=name, value=rate, unit="tokens/s", target=TARGET_RATE, is_limit=False)
        )
    name = f"waiting for data, steps of {tokens:,} tokens at 4 M tokens/s"
    share = median(_waiting(loader, tokens / TARGET_RATE) for _ in range(5))
    return [*figures, Figure(name=name, value=share, unit="%", target=0.5, is_limit=True)]


def _waiting(loader: StepLoader, step_seconds: float, num_steps: int = 8) -> float:
    """Return how many percent of some steps, after the first, go by until the next is there."""
    steps, waited = Ahead(map(loader.step, count())), 0.0
    next(steps)
    time.sleep(step_seconds)
    started = time.perf_counter()
    for _ in range(num_steps):
        before = time.perf_counter()
        next(steps)
        waited += time.perf_counter() - before
        time.sleep(step_seconds)
    seconds = time.perf_counter() - started
    steps.close()
    return 100 * waited / seconds


def _checking(folder: Path) -> Figure:
    size, started = 0, time.process_time()
    for path in sorted(folder.glob("*.shard")):
        assert not list(Shard(path).damaged())
        size += path.stat().st_size
    rate = size / (time.process_time() - started) / 2**30
    return Figure(
        name="check of all hashes, per second of one core", value=rate, unit="GiB/s",
        target=2.0, is_limit=False,
    )  # fmt: skip


def _packing(num_documents: int = 5_000_000, row_tokens: int = 8192) -> list[Figure]:
    """Pack documents into rows: seconds, and rows beside the fewest that could hold them.

    Of five repetitions: seconds of one core, and by the clock, where other jobs count too.
    """
    random = np.random.default_rng(0)
    lengths = random.lognormal(6.3, 1.16, num_documents).astype(np.int64).clip(1, row_tokens)
    seconds, cpu_seconds = [], []
    for _ in range(5):
        started, cpu_started = time.perf_counter(), time.process_time()
        rows = best_fit(lengths, row_tokens)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    fewest = -(-int(lengths.sum()) // row_tokens)
    excess = 100 * (int(rows.max()) + 1 - fewest) / fewest
    what = f"packing {num_documents:,} documents into rows of {row_tokens:,}"
    return [
        *(
            Figure(name=f"{what}, {kind}", value=value, unit="s", target=1.0, is_limit=True)
            for kind, value in (
                ("of one core", median(cpu_seconds)),
                ("median", median(seconds)),
                ("fastest", min(seconds)),
            )
        ),
        Figure(name=f"{what}: rows above the fewest", value=excess, unit="%", target=0.1,
               is_limit=True),
    ]  # fmt: skip


def _virtual(folder: Path) -> list[Figure]:
    figures = []
    for row_tokens in (5, 4096):
        command = [sys.executable, "-m", "benchmarks.loader", str(folder), str(row_tokens)]
        command.append(str(time.time()))
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        what = f"10 T tokens in rows of {row_tokens:,}: "
        figures += [
            Figure(name=what + name, value=found[name], unit=unit, target=target, is_limit=True)
            for name, unit, target in (
                ("first batch, after imports", "s", 2.0),
                ("first batch, from process start", "s", 2.0),
                ("step 1e8 of a resume", "s", 2.0),
                ("memory of index and reading", "MiB", 64.0),
                ("memory of the process", "MiB", 300.0),
            )
        ]
    return figures


def _read_virtual(folder: Path, row_tokens: int, started: float) -> None:
    """Be a fresh process: open, read the first step, one far away, and 4,000 rows."""
    before, opened = _status_mib("VmRSS"), time.time()
    loader = open_loader(folder, row_tokens, 8, 8)
    loader.step(0)
    first = time.time()
    loader.step(100_000_000)
    resumed = time.time()
    for step in range(1, 500):
        loader.step(step)
    found = {
        "first batch, after imports": first - opened,
        "first batch, from process start": first - started,
        "step 1e8 of a resume": resumed - first,
        "memory of index and reading": _status_mib("VmRSS") - before,
        "memory of the process": _status_mib("VmHWM"),
    }
    print(json.dumps(found))


def _status_mib(key: str) -> float:
    """Return a line of /proc/self/status: not ru_maxrss, which holds the parent's peak too."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _read_virtual(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    else:
        sys.exit(main())
