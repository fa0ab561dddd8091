"""Whether a run that failed is started again, and what is said of it. Standard library only."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.exit_codes import FINAL, FINISHED, INTERNAL, NO_PROGRESS, PREEMPTED, in_words
from launch.verdict import Witness, judge
from launch.watchdog import Hang

_UNFINISHED = ("data", "data_of_others", "train_step")  # phases of a step in which it is not done


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of one start that did not come to its own."""

    code: int
    sentence: str
    """Who failed first, why and where."""
    is_final: bool
    """Whether the same would happen again."""
    is_own: bool
    """Whether a rank raised it itself, and was not killed."""
    oom_step: int | None
    """Step in which memory ran out."""
    executed: int
    """Last step that some rank had done."""
    committed: int
    """Newest step with a checkpoint; 0: none."""

    @property
    def num_lost(self) -> int:
        return max(0, self.executed - self.committed)

    def __str__(self) -> str:
        return f"{self.sentence}; {standing(self.committed)}; steps lost: {self.num_lost}"


def failure_of(witnesses: Sequence[Witness], codes: Sequence[int], committed: int) -> Failure:
    """Judge one start by what its ranks left and the codes that they count for."""
    rank, sentence = judge(witnesses)
    blamed, record = witnesses[rank], witnesses[rank].record
    is_own = bool(record) and blamed.has_failed
    return Failure(
        code=codes[rank] if codes[rank] not in (FINISHED, PREEMPTED) else INTERNAL,
        sentence=sentence,
        is_final=(is_own and bool(record.get("is_final"))) or (not record and codes[rank] in FINAL),
        is_own=is_own,
        oom_step=int(blamed.spot.get("step", 0)) if blamed.is_oom else None,
        executed=max([committed, *(last_step(witness.place) for witness in witnesses)]),
        committed=committed,
    )


def leave_verdict(attempt: Path, failure: Failure) -> None:
    """Write down what is said of a start that failed: its ranks may have left nothing."""
    from trainer.directory import VERDICT  # here: the help needs nothing of the trainer
    from trainer.files import write_json
    from trainer.redaction import redact_tree

    said = redact_tree({"code": failure.code, "sentence": str(failure)})
    with suppress(OSError):  # the sentence is printed too
        write_json(attempt / VERDICT, said)


def with_hang(failure: Failure, hang: Hang, attempt: Path) -> Failure:
    """Say how long nothing was heard, and where the stacks of all ranks are."""
    return replace(
        failure,
        is_final=False,
        is_own=False,
        sentence=f"{failure.sentence}; no sign of life for {hang.seconds:.0f} s (limit of "
        f"{hang.section}: {hang.limit:.0f} s), stacks of all ranks in {attempt}/stacks.*.txt",
    )


def standing(committed: int) -> str:
    """Say what is left of a run, whatever happened."""
    return f"last committed step: {committed or 'none'}"


def way_on(committed: int) -> str:
    """Say what starting the same command again would do."""
    return f"the same command {f'goes on after step {committed}' if committed else 'starts anew'}"


def how_it_stopped(reason: str, committed: int, code: int = PREEMPTED) -> str:
    """Return the last words of a run that was asked to stop."""
    return f"{reason}; {standing(committed)}; {way_on(committed)} (exit code {code})"


def last_step(place: dict[str, Any]) -> int:
    """Return the last step that a rank has done in this start; 0: none that is known."""
    step = int(place.get("step", 0))
    return step - 1 if step and place.get("phase") in _UNFINISHED else step


@dataclass
class Restarts:
    """Counts the starts that brought nothing."""

    limit: int
    """Restarts in a row without a new checkpoint."""
    committed: int
    """Newest step with a checkpoint when counting began."""
    failures: list[Failure] = field(default_factory=list)
    num_in_vain: int = 0
    """Of the failures, the last ones that left no new checkpoint behind."""

    def end(self, failure: Failure) -> tuple[int, str] | None:
        """Take a failure in; return the exit code and last words where it is the end, else None."""
        before = self.failures[-1] if self.failures else None
        # An error before anything was done is a mistake in code or machine: it will come again.
        is_at_once = before is None and failure.is_own and failure.executed <= self.committed
        self.failures.append(failure)
        if failure.committed > self.committed:
            self.committed, self.num_in_vain = failure.committed, 0
        self.num_in_vain += 1
        why = self._why_not(failure, is_at_once=is_at_once)
        if why:
            return failure.code, _end(failure, f"not started again, {why}", failure.code)
        is_same = before is not None and before.oom_step == failure.oom_step
        if failure.oom_step is not None and is_same:
            why = (
                "memory ran out twice at this step: lower data.micro_rows, set "
                "engine.activation_checkpointing.mode=full, or shard the model (mesh=fsdp)"
            )
            return INTERNAL, _end(failure, why, INTERNAL)
        if self.num_in_vain > self.limit:
            first = self.failures[-self.num_in_vain]
            why = (
                f"gave up after {self.limit} restart{'s' if self.limit > 1 else ''} without a new "
                f"checkpoint, the last failure: {failure}"
            )
            return NO_PROGRESS, _end(first, why, NO_PROGRESS)
        return None

    def _why_not(self, failure: Failure, *, is_at_once: bool) -> str:
        """Say why a restart is of no use; empty: it may be."""
        if failure.code == PREEMPTED:
            return "since only a scheduler can replace a node"
        if failure.is_final:
            return "since the same would happen"
        if is_at_once:
            return "since no step was done: the same would happen"
        return "" if self.limit else "since launch.restarts=0"

    def in_words(self, recoveries: Sequence[float]) -> str:
        """Say how a run came to its end all the same; `recoveries`: seconds each."""
        count, first = len(self.failures), self.failures[0]
        seconds = ", ".join(f"{each:.1f} s" for each in recoveries)
        lost = sum(each.num_lost for each in self.failures)
        return (
            f"finished after {count} restart{'s' if count > 1 else ''}; steps done twice: {lost}; "
            f"time to recover: {seconds or 'not seen'}; the first failure: {first.sentence}"
        )

    @property
    def counted(self) -> str:
        return f"restart {self.num_in_vain} of {self.limit} without a new checkpoint"


def _end(failure: Failure, why: str, code: int) -> str:
    way = way_on(failure.committed)
    if code != PREEMPTED:
        way = f"once the cause is mended, {way}"
    return f"{failure}; {why}; {way}; {in_words(code)}"
