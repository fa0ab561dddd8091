"""When a step's loss or gradient norm is a spike, and what the run does about one."""

from dataclasses import dataclass
from enum import IntFlag


class Flag(IntFlag):
    """What is wrong with the numbers of a step."""

    LOSS_NOT_FINITE = 1
    GRADIENT_NOT_FINITE = 2
    LOSS_SPIKE = 4
    GRADIENT_SPIKE = 8


SPIKE = Flag.LOSS_SPIKE | Flag.GRADIENT_SPIKE
OFF, CLIP, SKIP, REWIND, STOP = "off", "clip", "skip", "rewind", "stop"
_DETECTS = ("z", "alpha", "warmup_steps")
_READS = {
    OFF: (), CLIP: _DETECTS, SKIP: _DETECTS, STOP: _DETECTS,
    REWIND: (*_DETECTS, "steps_back", "max_rewinds"),
}  # fmt: skip


def names_of(flags: int) -> list[str]:
    """Return the names of flags, as the ledger has them."""
    return [str(flag.name).lower() for flag in Flag(flags)]


def words_of(flags: int) -> str:
    """Return flags in words."""
    return " and ".join(name.replace("_", " ") for name in names_of(flags))


@dataclass(frozen=True, kw_only=True)
class SpikeSpec:
    """Finite numbers far above what they were: found by a running mean and variance."""

    policy: str = OFF
    """off; clip: the gradient, to what is usual (ZClip); skip the update; rewind: go back to a
    checkpoint and pass the data in between over; stop."""
    z: float | None = None
    """From how many standard deviations above the mean on a number is a spike."""
    alpha: float | None = None
    """How much of mean and variance a step leaves as it was."""
    warmup_steps: int | None = None
    """Steps that the first mean and variance are of; none of them is a spike."""
    steps_back: int | None = None
    """Steps, at least, from the checkpoint that a rewind goes back to, to the spike."""
    max_rewinds: int | None = None
    """Rewinds to one checkpoint after which the run stops."""

    def __post_init__(self) -> None:
        if self.policy not in _READS:
            known = ", ".join(_READS)
            raise ValueError(f"spike.policy={self.policy!r} is unknown; set it to one of {known}")
        for name in _READS[REWIND]:
            value = getattr(self, name)
            if name in _READS[self.policy] and value is None:
                raise ValueError(
                    f"spike.policy={self.policy} needs spike.{name}; set it, or take all of them "
                    f"from spike={self.policy}"
                )
            if name not in _READS[self.policy] and value is not None:
                raise ValueError(
                    f"spike.{name}={value} has no effect with spike.policy={self.policy}; remove "
                    "it, or choose spike=clip, skip, rewind or stop"
                )
            if value is not None and value <= 0:
                raise ValueError(f"spike.{name}={value} is not positive; set it above 0")
        if self.alpha is not None and self.alpha >= 1:
            raise ValueError(f"spike.alpha={self.alpha} learns nothing; set it below 1")
        if self.warmup_steps == 1:
            raise ValueError("spike.warmup_steps=1 has no variance; set it to 2 or more")

    @property
    def detects(self) -> bool:
        return self.policy != OFF

    def check(self, save_every: int | None, keep: int) -> None:
        """Raise ValueError where no checkpoint is left that a rewind could go back to."""
        if self.policy != REWIND:
            return
        assert self.steps_back is not None
        if save_every is None or (keep - 1) * save_every < self.steps_back:
            needed = -(-self.steps_back // (save_every or self.steps_back)) + 1
            every = save_every or self.steps_back
            raise ValueError(
                f"spike.steps_back={self.steps_back} lies before the {keep} checkpoints that are "
                f"kept with save_every={'null' if save_every is None else save_every}; set "
                f"checkpoint.keep={needed} and save_every={every}, or lower spike.steps_back"
            )
