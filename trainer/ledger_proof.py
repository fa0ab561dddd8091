"""Did a run train on every sample exactly once? Proved from the ledgers of all ranks and starts.

Standard library only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.ledger import Life, Line, surviving

Range = tuple[int, int]
NUMBERS, SAMPLES = "numbers", "samples"


@dataclass
class Proof:
    """What the ledgers of steps 1 to `last_step` show."""

    last_step: int
    samples: int = 0
    """Of the surviving history."""
    end: int = 0
    """The sample that the next step begins with."""
    passed_over: list[Range] = field(default_factory=list)
    """Samples that rewinds left out on purpose, as the ledger says."""
    lost: int = 0
    doubled: int = 0
    reexecuted: int = 0
    """Steps that a later start, or a rewind, executed again."""
    compared: int = 0
    """Those of them that should have the same numbers again, bit for bit."""
    mismatched: int = 0
    """Those that had other numbers or samples than before."""
    contradictions: int = 0
    """Of what the ranks of one start tell: ranks that are silent, or say something else."""
    mixtures: int = 1
    """How many mixtures of sources the run had."""
    by_source: dict[str, int] = field(default_factory=dict)
    """Samples of each source, where there are several."""
    findings: list[str] = field(default_factory=list)
    """Each of the above: which samples, which step, which attempt."""

    def check_passed_over(self, saved: list[list[int]]) -> None:
        """Find what the ledger calls left out, but no rewind of the newest checkpoint has."""
        known = [(first, last) for first, last in saved]
        for first, last in self.passed_over:
            if (first, last) not in known:
                self.findings.append(
                    f"samples {first} to {last - 1} are left out, but the newest checkpoint knows "
                    f"of no rewind that did it (it has {known})"
                )

    @property
    def holds(self) -> bool:
        return not self.findings


def prove(
    lives: list[Life],
    last_step: int,
    *,
    end: int | None,
    agreement: Callable[[Life, Life], tuple[str, ...]],
) -> Proof:
    """Check steps 1 to `last_step` of the surviving history, and what was executed again.

    Samples are numbered by their place in the run: a step holds those behind the step before it.
    `end` is where the checkpoint of the last step goes on, if it is there to say so. `agreement`
    says on what two lives that executed the same step should agree: SAMPLES, NUMBERS.
    """
    proof = Proof(last_step)
    owners = surviving(lives)
    place = 0
    for step in range(1, last_step + 1):
        if step not in owners:
            proof.findings.append(f"step {step}: no rank wrote it down")
            continue
        lines = owners[step].lines[step]
        _check_ranks(proof, lines, owners[step].ranks)
        place = _check_samples(proof, lines, place)
    proof.end = place
    if end is not None and end != place:
        proof.lost += max(0, end - place)
        proof.findings.append(
            f"step {last_step}: its checkpoint goes on with sample {end}, the ledger with {place}"
        )
    for earlier, later, step in _repeated(lives, last_step):
        same = agreement(earlier, later)
        if later is not owners.get(step):  # it died as well, and may lack some rank's line
            same = tuple(each for each in same if each != SAMPLES)
        proof.reexecuted += 1
        if same:
            proof.compared += NUMBERS in same
            _compare(proof, earlier.lines[step], later.lines[step], same)
    return proof


def _check_ranks(proof: Proof, lines: list[Line], ranks: dict[int, int]) -> None:
    """Every rank speaks; all agree on the numbers, and copies of a data rank on the samples."""
    for rank in ranks.keys() - {line.rank for line in lines}:
        proof.contradictions += 1
        proof.findings.append(
            f"step {lines[0].step} (attempt {lines[0].attempt}): rank {rank} wrote nothing"
        )
    first = {line.data_rank: line for line in reversed(lines)}
    for line in lines:
        for other, what in (
            (lines[0], NUMBERS), (lines[0], "passed_over"), (first[line.data_rank], SAMPLES),
        ):  # fmt: skip
            if getattr(line, what) != getattr(other, what):
                proof.contradictions += 1
                proof.findings.append(
                    f"step {line.step} (attempt {line.attempt}): rank {line.rank} has other {what} "
                    f"than rank {other.rank}: {getattr(line, what)}, {getattr(other, what)}"
                )


def _check_samples(proof: Proof, lines: list[Line], place: int) -> int:
    """Lay a step's samples behind `place`, where the step before ended; return where they end."""
    own = {line.data_rank: line for line in reversed(lines)}
    left_out = list(lines[0].passed_over)
    proof.passed_over += left_out
    where = f"step {lines[0].step} (attempt {lines[0].attempt})"
    parts = sorted((*part, line.rank) for line in own.values() for part in line.samples)
    for first, last, rank in parts:
        if first == last:
            continue  # a rank of a step with few documents
        for start, stop in _without(place, first, left_out):
            proof.lost += stop - start
            proof.findings.append(f"{where}: samples {start} to {stop - 1} are missing")
        if first < place:
            again = min(last, place)
            proof.doubled += again - first
            proof.findings.append(
                f"{where}: rank {rank} has samples {first} to {again - 1}, which were there before"
            )
        proof.samples += last - first
        place = max(place, last)
    return place


def _without(start: int, stop: int, left_out: list[Range]) -> Iterator[Range]:
    """Yield what of [start, stop) is not left out on purpose."""
    for first, last in sorted(left_out):
        if last <= start or first >= stop:
            continue
        if first > start:
            yield start, first
        start = last
    if start < stop:
        yield start, stop


def _repeated(lives: list[Life], last_step: int) -> Iterator[tuple[Life, Life, int]]:
    """Yield every execution of a step that is not the first, with the one before it.

    Not where a rewind lies between the two: its steps hold other samples.
    """
    before: dict[int, int] = {}
    for number, life in enumerate(lives):
        for step in sorted(life.lines):
            if step in before and step <= last_step:
                known = {gap for each in lives[: before[step] + 1] for gap in each.gaps}
                since = {
                    gap
                    for each in lives[before[step] + 1 : number + 1]
                    for gap, behind in each.gaps.items()
                    if behind <= step
                }
                if since <= known:
                    yield lives[before[step]], life, step
            before[step] = number


def _compare(proof: Proof, earlier: list[Line], later: list[Line], same: tuple[str, ...]) -> None:
    """A start that died may lack a rank's last line: its samples are some of the later ones."""
    was, now = earlier[0], later[0]
    complaints: list[tuple[str, Any, Any]] = []
    if NUMBERS in same and was.numbers != now.numbers:
        complaints.append((NUMBERS, was.numbers, now.numbers))
    trained = [part for line in later for part in line.samples]
    others = [gap for line in earlier for part in line.samples for gap in _without(*part, trained)]
    if SAMPLES in same and others:
        complaints.append((SAMPLES, sorted(others), "none of these"))
    proof.mismatched += bool(complaints)
    for what, old, new in complaints:
        proof.findings.append(
            f"step {was.step}: attempt {was.attempt} had the {what} {old}, "
            f"attempt {now.attempt}, which executed it again, {new}"
        )
