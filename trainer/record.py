"""What a run writes down about itself: metrics.jsonl by rank 0, and a ledger by every rank."""

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from trainer.control import HostResult
from trainer.files import write_text
from trainer.trackers.spool import METRICS


class RunRecord:
    """Appends to metrics.jsonl (None on other ranks) and to this rank's ledger.

    The ledger says what this rank really consumed, one line per executed step, and is never cut
    back; metrics are cut back to the resumed step, so that curves have no double points.
    """

    def __init__(self, folder: Path, *, rank: int, attempt: int, resumed_step: int) -> None:
        self.attempt = attempt
        self._metrics: IO[str] | None = None
        if rank == 0:
            cut_back(folder / METRICS, resumed_step)
            self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        ledger = folder / "ledger" / f"rank{rank:05d}.jsonl"
        is_torn = _is_torn(ledger)
        self._ledger = open(ledger, "a", encoding="utf-8")  # noqa: SIM115
        if is_torn:
            self._ledger.write("\n")  # else the first new line would be lost with the torn one
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append one object; NaN and infinities become strings."""
        if self._metrics is not None:
            line = {"step": step, "split": split, **values, "time": round(time.time(), 3)}
            self._metrics.write(json.dumps({k: plain(v) for k, v in line.items()}) + "\n")
            self._metrics.flush()

    def consumes(self, step: int, ranges: list[tuple[int, int]]) -> None:
        """Note which global samples this rank's step holds, until its result is known."""
        self._ranges[step] = ranges

    def result(self, result: HostResult | None) -> None:
        """Append the ledger line of an executed step."""
        if result is None:
            return
        line = {
            "attempt": self.attempt,
            "step": result.step,
            "samples": self._ranges.pop(result.step),
            "loss_sum": result.loss_sum.hex(),
            "num_targets": result.num_targets,
            "skipped": result.skipped,
        }
        self._ledger.write(json.dumps(line) + "\n")
        self._ledger.flush()

    def sync(self) -> None:
        """Make what was appended durable: before a checkpoint refers to it."""
        for file in (self._metrics, self._ledger):
            if file is not None:
                os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self._metrics, self._ledger):
            if file is not None:
                file.close()


def plain(value: Any) -> Any:
    """Return a value that JSON has: NaN and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a torn last line is left out."""
    if not path.exists():
        return []
    objects = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue  # torn by a crash in an earlier attempt
    return objects


def _is_torn(path: Path) -> bool:
    """Return whether the last line lacks its end: the writer died while writing it."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def cut_back(path: Path, step: int) -> None:
    """Drop the objects after `step`, and a torn tail."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
