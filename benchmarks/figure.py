"""What a benchmark hands to `benchmarks.compare`: one measured figure beside its target."""

from dataclasses import dataclass

from benchmarks.in_turn import Spread


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of one benchmark, with the number that is judged."""

    name: str
    """What was measured, with its unit."""
    ours: Spread
    theirs: Spread | None
    """The other side, measured in the same run; None where there is none."""
    target: str
    """The target in words."""
    limit: float
    """What `value` must keep to, in the unit of `value`."""
    value: float
    """The number that is judged: a median of ours, or a ratio of both sides."""
    is_upper: bool
    """Whether `value` must be at most `limit`; otherwise it must be at least `limit`."""

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit if self.is_upper else self.value >= self.limit
