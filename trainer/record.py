"""What a run writes down about itself: metrics.jsonl by rank 0, and a ledger by every rank."""

import json
import math
import os
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from trainer.evaluation_due import read_due, write_due
from trainer.files import read_lines, write_text
from trainer.numerics.spike import names_of
from trainer.points import METRICS

if TYPE_CHECKING:
    from trainer.control import HostResult

EVAL = "eval"


class RunRecord:
    """Appends to metrics.jsonl (None on other ranks) and to this rank's ledger.

    The ledger says what this rank really consumed, one line per executed step, and is never cut
    back; ranks that share a data rank consume the same. Metrics are cut back to the resumed
    step, so that curves have no double points.
    """

    def __init__(
        self, folder: Path, *, rank: int, data_rank: int, attempt: int, resumed_step: int
    ) -> None:
        self.folder, self.attempt, self.data_rank = folder, attempt, data_rank
        self._metrics: IO[str] | None = None
        if rank == 0:
            cut_back(folder / METRICS, resumed_step, owes=read_due(folder) == resumed_step)
            self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        ledger = folder / "ledger" / f"rank{rank:05d}.jsonl"
        is_torn = _is_torn(ledger)
        self._ledger = open(ledger, "a", encoding="utf-8")  # noqa: SIM115
        if is_torn:
            self._ledger.write("\n")  # else the first new line would be lost with the torn one
        self._samples: dict[int, dict[str, Any]] = {}

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append one object; NaN and infinities become strings."""
        if self._metrics is not None:
            line = {"step": step, "split": split, **values, "time": round(time.time(), 3)}
            self._metrics.write(json.dumps({k: plain(v) for k, v in line.items()}) + "\n")
            self._metrics.flush()

    def owes_evaluation(self, step: int | None) -> None:
        """Note that the evaluation of `step` was cut off and is to be repeated; None: of none."""
        if self._metrics is not None:
            write_due(self.folder, step)

    def consumes(
        self,
        step: int,
        ranges: list[tuple[int, int]],
        passed_over: tuple[int, int] | None = None,
    ) -> None:
        """Note which global samples this rank's step holds, until its result is known; and which
        ones, between the step before and this one, no rank trains on."""
        gap = {"passed_over": [passed_over]} if passed_over else {}
        self._samples[step] = {"samples": ranges, **gap}

    def result(self, result: "HostResult | None") -> None:
        """Append the ledger line of an executed step."""
        if result is None:
            return
        line = {
            "attempt": self.attempt,
            "step": result.step,
            "data_rank": self.data_rank,
            **self._samples.pop(result.step),
            "loss_sum": result.loss_sum.hex(),
            "num_targets": result.num_targets,
            "skipped": result.skipped,
            **({"flags": names_of(result.flags)} if result.flags else {}),
        }
        self._ledger.write(json.dumps(line) + "\n")
        self._ledger.flush()

    @property
    def files(self) -> tuple[Path, ...]:
        """What must be durable before a checkpoint refers to it."""
        return tuple(Path(file.name) for file in (self._metrics, self._ledger) if file is not None)

    def close(self) -> None:
        for file in (self._metrics, self._ledger):
            if file is not None:
                file.close()


def plain(value: Any) -> Any:
    """Return a value that JSON has: NaN and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value


def _is_torn(path: Path) -> bool:
    """Return whether the last line lacks its end: the writer died while writing it."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def cut_back(path: Path, step: int, *, owes: bool = False) -> None:
    """Drop the objects after `step`, and a torn tail; if its evaluation is owed, that too."""
    if path.exists():
        kept = [
            line
            for line in read_lines(path)
            if line["step"] <= step
            and not (owes and line["step"] == step and line["split"] == EVAL)
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
