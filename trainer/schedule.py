"""Learning rate as a pure function of the step: nothing to save, nothing to drift."""

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A factor on every group's learning rate."""

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor of optimizer step `step`, which counts from 1 to max_steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then 1."""

    warmup_steps: int = 0
    """Steps until the full learning rate."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, 0.0)

    def factor(self, step: int, max_steps: int) -> float:
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine to `min_ratio` at max_steps. Source: Loshchilov 2017."""

    warmup_steps: int
    """Steps until the full learning rate."""
    min_ratio: float = 0.1
    """Factor at the last step."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, self.min_ratio)

    def factor(self, step: int, max_steps: int) -> float:
        if step <= self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, plateau, linear decay to `min_ratio`. Source: Hu et al. 2024 (MiniCPM)."""

    warmup_steps: int
    """Steps until the full learning rate."""
    decay_fraction: float = 0.2
    """Share of max_steps, at the end, in which the rate falls."""
    min_ratio: float = 0.0
    """Factor at the last step."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, self.min_ratio)
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(
                f"schedule.decay_fraction={self.decay_fraction} is no share; "
                "set it above 0 and up to 1"
            )

    def factor(self, step: int, max_steps: int) -> float:
        decay_steps = max(1, round(self.decay_fraction * max_steps))
        done = max(0.0, (step - (max_steps - decay_steps)) / decay_steps)
        return _warmup(step, self.warmup_steps) * (1 - (1 - self.min_ratio) * min(1.0, done))


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _check(warmup_steps: int, min_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"schedule.warmup_steps={warmup_steps} is negative; set it to 0 or more")
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(f"schedule.min_ratio={min_ratio} is no share; set it between 0 and 1")
