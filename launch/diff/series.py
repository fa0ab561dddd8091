"""The numbers of a run by step, to the last bit, and where two of them begin to differ."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.columns import Columns


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one executed step."""

    total: float
    """Sum over the targets."""
    num_targets: int

    @property
    def mean(self) -> float:
        return self.total / self.num_targets if self.num_targets else float("nan")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How one series of a run stands to that of another."""

    name: str
    num_common: int
    """Steps that both have."""
    num_different: int = 0
    first_step: int | None = None
    """The first that differs; None: all are equal."""
    first: tuple[float, float] | None = None
    largest_step: int | None = None
    largest: float = 0.0
    """Relative to the larger of the two."""
    last_step: int | None = None
    last: tuple[float, float] | None = None
    note: str = ""

    @property
    def is_equal(self) -> bool:
        return not self.num_different

    def plain(self) -> dict[str, Any]:
        """Return values for JSON; what is no finite number as text."""
        words = {key: _plain(value) for key, value in asdict(self).items()}
        if self.first:
            words["first_hex"] = [value.hex() for value in self.first]
        return words


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and abs(value) in (float("inf"),) else value


def read_losses(folder: Path) -> dict[int, Loss]:
    """Return the loss of every step that the run's weights come from; nothing without a ledger.

    All ranks wrote the same numbers. A start, or a rewind, that executes a step again takes the
    place of all that came after it.
    """
    files = sorted((folder / "ledger").glob("rank*.jsonl"))
    found: dict[int, Loss] = {}
    newest = 0
    for step, loss in _ledger_lines(files[0]) if files else ():
        if step <= newest:
            found = {known: each for known, each in found.items() if known < step}
        found[step], newest = loss, step
    return found


def _ledger_lines(path: Path) -> Iterator[tuple[int, Loss]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
                loss = Loss(
                    total=float.fromhex(values["loss_sum"]), num_targets=int(values["num_targets"])
                )
                yield int(values["step"]), loss
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
                continue  # torn by a crash, or a note about a step


def column(columns: Columns, name: str) -> dict[int, float]:
    """Return a series of metrics.jsonl by step."""
    return dict(zip(*columns.series(name), strict=True))


def windows(columns: Columns) -> dict[tuple[int, int], float]:
    """Return the logged losses, each by the step before its first and by its last."""
    steps, values = columns.series("loss")
    return dict(zip(zip([0, *steps], steps, strict=False), values, strict=True))


def compare(
    name: str,
    a: dict[int, float],
    b: dict[int, float],
    *,
    is_same: Callable[[int], bool] | None = None,
    note: str = "",
) -> Drift:
    """Compare two series at the steps that both have.

    `is_same` says of such a step whether its numbers are equal; default: in every bit.
    """
    common = sorted(a.keys() & b.keys())
    differ = [
        step for step in common if not (is_same(step) if is_same else _bits(a[step], b[step]))
    ]
    if not differ:
        return Drift(name=name, num_common=len(common), note=note)
    first, last = differ[0], common[-1]
    largest = max(differ, key=lambda step: relative(a[step], b[step]))
    return Drift(
        name=name, num_common=len(common), num_different=len(differ), note=note,
        first_step=first, first=(a[first], b[first]),
        largest_step=largest, largest=relative(a[largest], b[largest]),
        last_step=last, last=(a[last], b[last]),
    )  # fmt: skip


def _bits(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


def relative(a: float, b: float) -> float:
    """Return the difference relative to the larger number; infinite where one is not finite."""
    size = max(abs(a), abs(b))
    if not size < float("inf"):
        return float("inf")
    return abs(a - b) / size if size else 0.0
