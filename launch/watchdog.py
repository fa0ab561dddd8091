"""Which ranks have shown no sign of life for too long. Standard library only.

A rank's place file (trainer/whereabouts.py) changes at each phase of a step and at each batch of an
evaluation. How long it may stay the same is learnt from the run itself, for each kind of work.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from launch.traces import STOPPED

SETUP, STEP, EVALUATE, SAVE = "setup", "step", "evaluate", "save"
_SECTIONS = {
    "data": STEP, "data_of_others": STEP, "train_step": STEP, "control": STEP, "log": STEP,
    "save": SAVE, "evaluate": EVALUATE, "validate": EVALUATE,
}  # fmt: skip
FACTOR = 5.0  # times the slowest hundredth that was seen
ENOUGH = 20  # durations, before the floor takes the place of the start value
_KEPT = 1000  # durations of each section
MAX_GAP = 1.0  # seconds between two looks that count: whoever did not look has seen no hang
_IDLE = 0.01  # share of a core below which a process that is set up counts as idle


@dataclass(frozen=True, kw_only=True)
class WatchdogSpec:
    """How long a rank may show no sign of life before the group is ended, in seconds."""

    setup_seconds: float = 600.0
    """Until the first step is done, with all processes idle; and for the first evaluation."""
    step_seconds: float = 180.0
    """In a step, until enough of them are known; later for a batch of an evaluation."""
    save_seconds: float = 420.0
    """In a save, however short those before were."""
    floor_seconds: float = 60.0
    """In a step, however short those before were."""
    stopped_seconds: float = 5.0
    """That a process may be stopped (SIGSTOP): the kernel says so, no limit has to be learnt."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"launch.watchdog.{name}={value} is not positive; raise it")


@dataclass
class _Rank:
    """What the last looks at a rank have shown."""

    beats: Any = None
    section: str = SETUP
    seconds: float = 0.0
    """Since the last sign of life."""
    stopped_seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hang:
    """What was found."""

    rank: int
    seconds: float
    limit: float
    section: str


@dataclass
class Watchdog:
    """Looks at the places of all ranks, again and again."""

    spec: WatchdogSpec
    num_ranks: int
    first_step: int
    """Up to this step a start is set up: what is compiled then takes its time."""
    ranks: list[_Rank] = field(init=False)
    known: dict[str, "deque[float]"] = field(init=False)
    _idle_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.ranks = [_Rank() for _ in range(self.num_ranks)]
        self.known = {name: deque(maxlen=_KEPT) for name in (STEP, EVALUATE, SAVE)}

    def look(self, places: list[dict[str, Any]], gap: float) -> Hang | None:
        """Take in what the places say `gap` seconds after the last look; return a hang, if any."""
        gap = min(gap, MAX_GAP)
        hangs = [self._look_at(number, place, gap) for number, place in enumerate(places)]
        is_idle = not any([self._has_worked(rank, places[n]) for n, rank in enumerate(self.ranks)])
        self._idle_seconds = self._idle_seconds + gap if is_idle else 0.0
        return next((hang for hang in hangs if hang is not None), None)

    def _look_at(self, number: int, place: dict[str, Any], gap: float) -> Hang | None:
        rank, section = self.ranks[number], self._section(place)
        is_stopped = place.get("state") == STOPPED
        rank.stopped_seconds = rank.stopped_seconds + gap if is_stopped else 0.0
        if rank.stopped_seconds > self.spec.stopped_seconds:
            seconds, limit = rank.stopped_seconds, self.spec.stopped_seconds
            return Hang(rank=number, seconds=seconds, limit=limit, section=section)
        beats = place.get("beats")
        if beats != rank.beats:
            if rank.section in self.known:
                self.known[rank.section].append(rank.seconds)
            rank.beats, rank.section, rank.seconds = beats, section, 0.0
            return None
        rank.seconds += gap
        seconds = min(rank.seconds, self._idle_seconds) if section == SETUP else rank.seconds
        limit = self.limit(section)
        if seconds <= limit:
            return None
        return Hang(rank=number, seconds=seconds, limit=limit, section=section)

    def _section(self, place: dict[str, Any]) -> str:
        section = _SECTIONS.get(str(place.get("phase")), SETUP)
        is_first = section == STEP and int(place["step"]) <= self.first_step
        return SETUP if is_first else section

    def limit(self, section: str) -> float:
        """Return the seconds that a rank may show no sign of life."""
        spec = self.spec
        start = {STEP: spec.step_seconds, SAVE: spec.save_seconds}.get(section, spec.setup_seconds)
        known = sorted(self.known.get(section, ()))
        slowest = known[math.ceil(0.99 * len(known)) - 1] if known else 0.0
        if len(known) >= ENOUGH:
            # A save that is waited for is not like those in the background, nor are the metrics of
            # an evaluation like one of its batches.
            least = {STEP: spec.floor_seconds, EVALUATE: spec.step_seconds}.get(section, start)
        else:
            least = start
        return max(least, FACTOR * slowest)

    def _has_worked(self, rank: _Rank, place: dict[str, Any]) -> bool:
        """Whether a process has shown a sign of life, or has used its core since the last look that
        found it busy: making data or loading weights, it has no phases."""
        used = float(place.get("cpu_seconds", 0.0))
        is_busy = used - rank.cpu_seconds > _IDLE * (self._idle_seconds + MAX_GAP)
        if is_busy:
            rank.cpu_seconds = used
        return is_busy or rank.seconds == 0.0
