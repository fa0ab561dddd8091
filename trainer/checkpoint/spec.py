"""How checkpoints are kept: the settings below `checkpoint.`."""

from dataclasses import dataclass

from trainer.checkpoint.contents import AUTO, CHOICES

AUTO_INTERVAL = "auto"


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """How checkpoints are kept."""

    keep: int = 2
    """Newest checkpoints that stay on disk."""
    max_file_gb: float = 5.0
    """Largest weight file, in 1e9 bytes; a larger model is split as Hugging Face splits it."""
    contents: str = AUTO
    """`model`, all weights; `trained`, those that train and the hash of all others; `auto`: trained
    with freeze=new_tokens, else model. An adapter is always saved alone."""
    background: bool = True
    """Write while training goes on, which waits for a copy in host memory alone; false: training
    waits until a checkpoint is on disk."""

    interval: float | str | None = None
    """Seconds between saves, or `auto`: what loses least by the measured cost of a save and the
    time between failures; null: by `save_every` alone, which has to be null otherwise."""
    mtbf_hours: float | None = None
    """Hours between failures of the whole run, for `auto`; null: 50,700 by the number of ranks."""

    max_minutes_without: float | None = 60.0
    """Minutes from a failed save on within which a checkpoint must be good: then one more is tried,
    and the run ends if that fails, too; null: three failures in a row end it, however long."""

    def __post_init__(self) -> None:
        self._check_interval()
        if self.max_minutes_without is not None and not self.max_minutes_without > 0:
            raise ValueError(
                f"checkpoint.max_minutes_without={self.max_minutes_without}: set it above 0, or to "
                "null"
            )
        if self.contents not in CHOICES:
            raise ValueError(
                f"checkpoint.contents={self.contents}: set it to {' or '.join(CHOICES)}"
            )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} would keep none; set it to 1 or more")
        if self.max_file_gb <= 0:
            raise ValueError(f"checkpoint.max_file_gb={self.max_file_gb}: set it above 0")

    def check(self, save_every: int | None) -> None:
        """Raise ValueError where two settings say when to save."""
        if self.interval is not None and save_every is not None:
            raise ValueError(
                f"save_every={save_every} and checkpoint.interval={self.interval} both say when to "
                "save; set one of them to null"
            )

    def _check_interval(self) -> None:
        is_seconds = isinstance(self.interval, int | float) and 0 < self.interval < float("inf")
        if self.interval is not None and self.interval != AUTO_INTERVAL and not is_seconds:
            raise ValueError(
                f"checkpoint.interval={self.interval}: set it to seconds above 0, auto or null"
            )
        if self.mtbf_hours is not None and self.interval != AUTO_INTERVAL:
            raise ValueError(
                "checkpoint.mtbf_hours has no effect without checkpoint.interval=auto; set that, "
                "or leave it out"
            )
        if self.mtbf_hours is not None and not 0 < self.mtbf_hours < float("inf"):
            raise ValueError(f"checkpoint.mtbf_hours={self.mtbf_hours}: set it above 0")
