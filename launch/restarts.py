"""Whether a run that failed is started again, and what is said of it. Standard library only."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.exit_codes import FINISHED, INTERNAL, MEANINGS, NO_PROGRESS, PREEMPTED
from launch.verdict import Witness, judge
from launch.watchdog import Hang
from trainer.directory import VERDICT
from trainer.files import write_json
from trainer.redaction import redact_tree

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
        return (
            f"{self.sentence}; last committed step: {self.committed or 'none'}; "
            f"steps lost: {self.num_lost}"
        )


def failure_of(witnesses: Sequence[Witness], codes: Sequence[int], committed: int) -> Failure:
    """Judge one start by what its ranks left and the codes that they count for."""
    rank, sentence = judge(witnesses)
    blamed, record = witnesses[rank], witnesses[rank].record
    is_own = bool(record) and blamed.has_failed
    return Failure(
        code=codes[rank] if codes[rank] not in (FINISHED, PREEMPTED) else INTERNAL,
        sentence=sentence,
        is_final=is_own and bool(record.get("is_final")),
        is_own=is_own,
        oom_step=int(blamed.spot.get("step", 0)) if blamed.is_oom else None,
        executed=max([committed, *(last_step(witness.place) for witness in witnesses)]),
        committed=committed,
    )


def leave_verdict(attempt: Path, failure: Failure) -> None:
    """Write down what is said of a start that failed: its ranks may have left nothing."""
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
        if failure.is_final or is_at_once or not self.limit:
            return failure.code, f"{failure}; {_meaning(failure.code)}"
        is_same = before is not None and before.oom_step == failure.oom_step
        if failure.oom_step is not None and is_same:
            return INTERNAL, (
                f"{failure}; memory ran out twice at this step: lower data.micro_rows, set "
                f"activation_checkpointing, or shard the model (mesh=fsdp); {_meaning(INTERNAL)}"
            )
        if self.num_in_vain > self.limit:
            first = self.failures[-self.num_in_vain]
            return NO_PROGRESS, (
                f"{first}; gave up after {self.limit} restarts without a new checkpoint, the last "
                f"failure: {failure}; {_meaning(NO_PROGRESS)}"
            )
        return None

    @property
    def counted(self) -> str:
        return f"restart {self.num_in_vain} of {self.limit} without a new checkpoint"


def _meaning(code: int) -> str:
    return f"exit code {code} ({MEANINGS.get(code, '')})"
