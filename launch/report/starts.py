"""What befell a run: its starts and how each ended, steps that were skipped, and rewinds."""

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.traces import read_records
from trainer.directory import COMMAND, CONFIG, VERDICT, attempts_of
from trainer.drift import difference
from trainer.files import read_mapping
from trainer.stored_config import read_stored

MAX_RANKS = 256  # whose records are read, of each start
MAX_SKIPPED = 1000  # skipped steps that are told apart
_IDLE = ("launch", "resume", "stop_at")


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run: RUN/attempts/NNN."""

    number: int
    first_step: int | None
    """Of those that it executed; None: it came to none."""
    last_step: int | None
    records: list[dict[str, Any]]
    """What its ranks left when they ended, those that did."""
    verdict: dict[str, Any]
    """What the supervisor said of its failure: `code` and `sentence`; empty: nothing."""
    changes: dict[str, tuple[Any, Any]]
    """Settings that differ from the start before."""

    @property
    def ending(self) -> tuple[int | None, str]:
        """The exit code and the reason; no code where nobody could leave one."""
        failed = [each for each in self.records if each.get("code") not in (0, 75)]
        own = [each for each in failed if not each.get("is_consequence")]
        found = sorted(own or failed or self.records, key=_time)
        record = found[0] if found else {}
        code = self.verdict.get("code", record.get("code"))
        reason = self.verdict.get("sentence", record.get("reason"))
        unknown = "left no record: it was killed, or is still running"
        return code if type(code) is int else None, str(reason or unknown)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A step whose update was left out."""

    attempt: int
    step: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Past:
    """What the folders and ledgers of all starts tell."""

    starts: list[Start]
    skipped: list[Skipped]
    rewinds: list[tuple[int, int]]
    """The step at which the run went back, and the one that it went back to."""
    command: list[str] = field(default_factory=list)
    """The words of the newest start that are known."""

    @property
    def restarts(self) -> list[int]:
        """The first step of every start but the first."""
        return [start.first_step for start in self.starts[1:] if start.first_step is not None]


def read_past(folder: Path) -> Past:
    """Return what is known; whatever cannot be read is left out."""
    ledger = Ledger(folder / "ledger/rank00000.jsonl")
    attempts = attempts_of(folder)
    spans = ledger.spans([int(path.name) for path in attempts])
    starts, before = [], None
    for path in attempts:
        config = _config(path / CONFIG)
        starts.append(_start(path, spans.get(int(path.name)), before, config))
        before = config or before
    commands = [found for path in attempts if (found := read_mapping(path / COMMAND))]
    words = commands[-1].get("words") if commands else []
    return Past(
        starts=starts, skipped=list(ledger.skipped()), rewinds=_rewinds(folder),
        command=list(map(str, words)) if isinstance(words, list) else [],
    )  # fmt: skip


def _start(
    path: Path,
    span: tuple[int, int] | None,
    before: dict[str, Any] | None,
    config: dict[str, Any] | None,
) -> Start:
    numbers = (file.name.split(".")[1] for file in path.glob("exit.*.json"))
    ranks = sorted(int(number) for number in numbers if number.isdigit())[:MAX_RANKS]
    known = difference(before, config) if before is not None and config is not None else {}
    return Start(
        number=int(path.name),
        first_step=span and span[0],
        last_step=span and span[1],
        records=[record for record in read_records(path, ranks) if record],
        verdict=read_mapping(path / VERDICT),
        changes={key: pair for key, pair in known.items() if not key.startswith(_IDLE)},
    )


class Ledger:
    """A rank's ledger, of which the few lines are parsed that say something new."""

    def __init__(self, path: Path) -> None:
        self.data: bytes | mmap.mmap = b""
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def spans(self, attempts: list[int]) -> dict[int, tuple[int, int]]:
        """Return the first and the last step that each start executed."""
        found = {}
        for attempt in attempts:
            mark = b'"attempt": %d,' % attempt
            first, last = self.data.find(mark), self.data.rfind(mark)
            lines = [line for line in (self._line(first), self._line(last)) if line]
            steps = [line["step"] for line in lines if type(line.get("step")) is int]
            if len(steps) == 2:
                found[attempt] = (steps[0], steps[1])
        return found

    def skipped(self) -> Iterator[Skipped]:
        """Yield the steps that were left out, in the order of time."""
        place = self.data.find(b'"skipped": true')
        for _ in range(MAX_SKIPPED):
            if place < 0:
                return
            line = self._line(place) or {}
            if type(line.get("step")) is int and type(line.get("attempt")) is int:
                flags = " and ".join(str(flag).replace("_", " ") for flag in line.get("flags", []))
                yield Skipped(attempt=line["attempt"], step=line["step"], why=flags)
            place = self.data.find(b'"skipped": true', place + 1)

    def _line(self, place: int) -> dict[str, Any] | None:
        """Return the object around a place; None where there is none that is whole."""
        if place < 0:
            return None
        end = self.data.find(b"\n", place)
        start = self.data.rfind(b"\n", 0, place) + 1
        try:
            found = json.loads(self.data[start : end if end >= 0 else len(self.data)])
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


def _rewinds(folder: Path) -> list[tuple[int, int]]:
    from trainer.numerics.rewinds import read_rewinds

    try:
        found = read_rewinds(folder)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []
    return sorted((spike, step) for step, one in found.items() for spike in one.spikes)


def _config(path: Path) -> dict[str, Any] | None:
    try:
        return read_stored(path)
    except (OSError, ValueError):
        return None


def _time(record: dict[str, Any]) -> float:
    time = record.get("time")
    return time if isinstance(time, int | float) else float("inf")
