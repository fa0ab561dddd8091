"""Three real steps of a run, in a folder that goes again: how fast, and how much memory."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from launch.group import safe_paths
from trainer.files import read_lines
from trainer.points import METRICS

STEPS = 3
NO_EXTRAS = (
    "eval_every=null", "validation.every=null", "best.metric=null", "best.patience=null",
    "tracker=none", "callbacks.closing=null", "callbacks.ngrams=null",
)  # fmt: skip
"""What takes its own time beside the steps is left out."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What this machine did."""

    tokens_per_second: float
    """The median of the steps behind the first one, which warms up; padding left out."""
    memory_gib: float
    """Rank 0's peak: of a GPU's allocator, or on a CPU of the whole process."""


def probe(words: list[str], processes: int) -> Probe:
    """Train three steps of a command line's config; RuntimeError with its last line if it fails."""
    with tempfile.TemporaryDirectory(prefix="tessera-probe-") as runs:
        own = [
            f"max_steps={STEPS}", "log_every=1", f"launch.processes={processes}", f"runs={runs}",
            "name=probe", "resume=never", *NO_EXTRAS,
        ]  # fmt: skip
        kept = [w for w in words if w.partition("=")[0] not in {o.partition("=")[0] for o in own}]
        kept = [w for w in kept if not w.startswith(("max_epochs=", "validation.", "best."))]
        done = subprocess.run(
            [sys.executable, "-m", "launch", "train", *kept, *own],
            env=os.environ | safe_paths(os.environ), capture_output=True, text=True, check=False,
        )  # fmt: skip
        metrics = Path(runs) / "probe" / METRICS
        if done.returncode or not metrics.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
            raise RuntimeError(f"probe=true: training ended with {done.returncode}: {last}")
        lines = read_lines(metrics)
    steps = [line for line in lines if line.get("split") == "train"]
    return Probe(
        tokens_per_second=median(line["tokens_per_second"] for line in steps[1:]),
        memory_gib=max(line["memory_gib"] for line in steps),
    )
