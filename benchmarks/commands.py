"""How benchmarks run `tessera` as a command: when its first loss shows, how long its steps take."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.figure import Figure
from benchmarks.in_turn import append_row, machine, read_texts, show
from benchmarks.train_step_figures import SETTINGS
from launch.exit_codes import BAD_CONFIG, FINISHED, INTERNAL

LLAMA_40M = (
    *SETTINGS.model, "data=stdlib", "tokenizer=byte", "data.row_tokens=512", "data.global_rows=8",
    "data.micro_rows=4",
)  # fmt: skip
DEMO = ("experiment=demo", "callbacks.closing=null", "callbacks.ngrams=null")
QUIET = ("eval_every=null", "save_every=null", "resume=never")
FIRST_LOSS = re.compile(r"step +1/\d+ \| loss")


def tessera(words: Sequence[str], home: Path, until: re.Pattern[str] | None = None) -> float:
    """Run a command to its end; return the seconds to the first line that matches, or to the end.

    `home` holds its caches. ChildProcessError where it fails or never says the line.
    """
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHIND")}
    start, said, seconds = time.monotonic(), "", None
    with subprocess.Popen(
        [sys.executable, "-m", "launch", *words], env={**environ, "HOME": str(home)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if seconds is None and until is not None and until.search(line):
                seconds = time.monotonic() - start
    if process.returncode or (seconds is None and until is not None):
        raise ChildProcessError(
            f"{' '.join(words)}: exit code {process.returncode}\n{said[-2000:]}"
        )
    return time.monotonic() - start if seconds is None else seconds


def median_step(run: Path, warmup: int) -> float:
    """Return the median seconds of the logged steps after `warmup`; each step was logged."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = [line["time"] for line in lines if line["split"] == "train"][warmup - 1 :]
    return median(later - earlier for earlier, later in pairwise(times))


def report(found: Sequence[Figure], results: Path) -> None:
    """Print figures as `target / measured / met`, and append them as a row."""
    for each in found:
        verdict = "met" if each.is_met else "MISSED"
        spreads = show(each.ours, 3) + (f" beside {show(each.theirs, 3)}" if each.theirs else "")
        print(f"{each.name}: {each.target} / {each.value:.3f} / {verdict}   ({spreads})")
    append_row(
        results, {"machine": machine(), "figures": [{**vars(f), "met": f.is_met} for f in found]}
    )


def run(
    doc: str | None,
    words: Sequence[str],
    defaults: dict[str, str],
    figures: Callable[[dict[str, str]], list[Figure]],
    results: Path,
) -> int:
    """Measure by the options in `words`, print, and append a row; return the exit code.

    `results` is named as the benchmark, `doc` is its help.
    """
    if "--help" in words or "-h" in words:
        print(doc)
        return FINISHED
    try:
        report(figures(read_texts(list(words), defaults)), results)
    except (ValueError, ChildProcessError) as error:
        print(f"{results.stem}: {error}", file=sys.stderr)
        return INTERNAL if isinstance(error, ChildProcessError) else BAD_CONFIG
    return FINISHED
