"""Which rank failed first, or did not arrive: from what the ranks left behind, in one sentence.

Standard library only, and no collective: it is asked when those no longer work. Each rank keeps a
file with its place in the run (trainer/whereabouts.py) and leaves a record when it fails.
"""

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.exit_codes import FINAL, FINISHED, PREEMPTED, in_words
from launch.traces import GONE, STOPPED

MAX_SHOWN = 4  # samples, sources or ranks in one line; the exit record lists all
MAX_REASON = 2000  # characters: the remedy comes last
NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Witness:
    """What is known of one rank after a failure."""

    rank: int
    place: dict[str, Any] = field(default_factory=dict)
    """Where it was when the first failure was seen; empty: it had not come so far."""
    record: dict[str, Any] = field(default_factory=dict)
    """What it left when it ended; empty: nothing."""
    return_code: int | None = None
    """Of a process that ended by itself; None: it goes on, had to be killed, or cannot be seen."""
    was_out_of_memory: bool | None = None
    """Whether the kernel killed a process of this job for its memory; None: nobody knows."""

    @property
    def code(self) -> int | None:
        """The exit code of a process that ended by itself and left a record of it.

        A full disk takes no record, and no accident ends a process with a code of FINAL.
        """
        is_told = self.record.get("code") == self.return_code or self.return_code in FINAL
        return self.return_code if is_told else None

    @property
    def has_ended_well(self) -> bool:
        return self.record.get("code") in (FINISHED, PREEMPTED) and self._is_as_recorded

    @property
    def _is_as_recorded(self) -> bool:
        return bool(self.record) and self.return_code in (None, self.record["code"])

    @property
    def has_failed(self) -> bool:
        """Whether it failed by itself or was killed.

        gloo and NCCL abort a rank over a collective that does not match: no cause of its own.
        """
        if self.record:
            return not self.has_ended_well and not self.record.get("is_consequence", False)
        return self.return_code not in (None, -signal.SIGABRT)

    @property
    def is_silent(self) -> bool:
        """Whether it noticed nothing: it was in no collective, or is stopped."""
        return not self.record and self.return_code is None and self.state != GONE

    @property
    def state(self) -> str:
        """Whether its process was stopped, or is gone with nothing left."""
        return "" if self.record else str(self.place.get("state", ""))

    @property
    def time(self) -> float:
        """When it ended, as far as it could say."""
        return float(self.record.get("time", NEVER))

    @property
    def since(self) -> float:
        """When it began to wait, if it says that it did."""
        place = self.record.get("collective") or self.spot
        return float(place.get("since", NEVER)) if self.record else NEVER

    @property
    def reason(self) -> str:
        reason = str(self.record["reason"] if self._is_as_recorded else self._ending)
        return " ".join(reason.split())[:MAX_REASON]

    @property
    def is_oom(self) -> bool:
        """Whether memory ran out, of the machine or of the GPU, as far as that is known."""
        if self.record and self._is_as_recorded:
            return bool(self.record.get("is_oom"))
        return self.return_code == -signal.SIGKILL and bool(self.was_out_of_memory)

    @property
    def _ending(self) -> str:
        code = self.return_code
        if code is None:
            return "no record"
        if code >= 0:
            said = in_words(code) if code in FINAL else f"exit code {code}"
            return f"{said}, and no record of it"
        hints = {True: " (the kernel ran out of memory for it)", None: " (out of memory?)"}
        hint = hints.get(self.was_out_of_memory, "") if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"

    @property
    def spot(self) -> dict[str, Any]:
        """Its place; that of its record where it had no file yet."""
        return self.place if "phase" in self.place else self.record

    @property
    def where(self) -> str:
        """For example ` in step 3 (train_step)`."""
        phase, step = self.spot.get("phase"), self.spot.get("step")
        if not phase:
            return ""
        return f" in step {step} ({phase})" if step else f" in phase {phase}"

    @property
    def work(self) -> str:
        """The samples that it worked on, and where they come from, if it was at work on some."""
        if self.record.get("is_of_samples") is False:
            return ""
        ranges = [f"[{first}:{last}]" for first, last in self.spot.get("samples", [])]
        sources = self.record.get("provenance", [])
        shown = f", samples {_some(ranges)}" if ranges else ""
        return shown + (f" from {_some(sources, ', ')}" if ranges and sources else "")

    @property
    def collective(self) -> str:
        """What it waited in, for example ` for all_reduce of [[4]] (number 7 of group control)`."""
        found = self.record.get("collective")
        if not found:
            return ""
        return (
            f" for {found['name']} of {found['sizes']} "
            f"(number {found['number']} of group {found['group']})"
        )

    @property
    def waited(self) -> str:
        """For how long, and in what."""
        seconds = f" {self.time - self.since:.0f} s" if 1 < self.time - self.since < NEVER else ""
        return f"waited{seconds}{self.where}{self.collective}"


def judge(witnesses: Sequence[Witness]) -> tuple[int, str]:
    """Return the rank to blame, and what it did."""
    total = len(witnesses)
    failed = [witness for witness in witnesses if witness.has_failed]
    if failed or all(witness.has_ended_well for witness in witnesses):
        # Without a record it was killed: the others fail because of it, so it comes first.
        first = min(failed or witnesses, key=lambda witness: witness.record.get("time", 0.0))
        sentence = f"failed first{first.where}{first.work}: {first.reason}"
        return first.rank, f"rank {first.rank} of {total} {sentence}"
    absent, waiting = _parted(witnesses)
    if not absent:
        return waiting[0].rank, _disagreement(waiting)
    said = waiting[0].collective if waiting else ""
    states = "; ".join(_did(witness, said, len(absent) == 1) for witness in absent[:MAX_SHOWN])
    sentence = f"{_names(absent)} of {total} did not arrive: {states}"
    if waiting:
        sentence += f"; {_names(waiting)} {waiting[0].waited}"
    return absent[0].rank, sentence


def _parted(witnesses: Sequence[Witness]) -> tuple[list[Witness], list[Witness]]:
    """Return the ranks that were missing, and those that waited; none is missing if all are alike.

    Missing is who noticed nothing, or came when the first had given up, or is gone. Where all
    noticed, it is who was elsewhere than most; of as many, than the one that waited longest.
    """
    longest = min(witnesses, key=lambda witness: witness.since)
    given_up = min(witness.time for witness in witnesses)
    sizes = Counter(_key(witness) for witness in witnesses)
    most = max(sizes, key=lambda key: (sizes[key], key == _key(longest)))
    elsewhere = [witness for witness in witnesses if _key(witness) != most]
    silent = [witness for witness in witnesses if witness.is_silent]
    absent = (
        # A rank that still waits has said nothing either, but it is where the others are.
        [witness for witness in silent if witness in elsewhere or witness.state == STOPPED]
        or [witness for witness in witnesses if given_up < witness.since < NEVER]
        or elsewhere
        or [witness for witness in witnesses if not witness.record]
    )
    return absent, [witness for witness in witnesses if witness not in absent]


def _key(witness: Witness) -> tuple[object, object]:
    return witness.spot.get("step"), witness.spot.get("phase")


def _did(witness: Witness, others_waited_for: str, is_alone: bool) -> str:
    """What a missing rank did instead."""
    who = "it" if is_alone else f"rank {witness.rank}"
    place = f"{witness.where}{witness.work}"
    if not place:
        return f"{who} had not come to the run yet"
    if witness.return_code == -signal.SIGABRT:
        return f"{who} was aborted{place}, by gloo or NCCL: the collectives did not match"
    if witness.state == GONE:
        return f"{who} ended without a record{place}: killed, or aborted over a collective"
    if witness.state == STOPPED:
        return f"{who} is stopped (SIGSTOP){place}"
    if not witness.collective:
        return f"{who} was{place}"
    if witness.collective == others_waited_for:
        return f"{who} came too late{place}"
    return f"{who} {witness.waited}: the ranks issued different collectives"


def _disagreement(witnesses: Sequence[Witness]) -> str:
    """All ranks waited at the same place: say what each waited for."""
    told = "; ".join(f"rank {witness.rank} {witness.waited}" for witness in witnesses[:MAX_SHOWN])
    are_alike = len({witness.collective for witness in witnesses}) == 1
    kind = "the same collective: look at the network" if are_alike else "different collectives"
    return f"all {len(witnesses)} ranks were{witnesses[0].where}, but in {kind}: {told}"


def _names(witnesses: Sequence[Witness]) -> str:
    numbers = _some([str(witness.rank) for witness in witnesses], ", ")
    return f"rank {numbers}" if len(witnesses) == 1 else f"ranks {numbers}"


def _some(words: Sequence[str], separator: str = " ") -> str:
    more = len(words) - MAX_SHOWN
    shown = separator.join(words[:MAX_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
