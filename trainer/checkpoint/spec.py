"""How checkpoints are kept: the settings below `checkpoint.`."""

from dataclasses import dataclass

from trainer.checkpoint.contents import AUTO, CHOICES


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

    def __post_init__(self) -> None:
        if self.contents not in CHOICES:
            raise ValueError(
                f"checkpoint.contents={self.contents}: set it to {' or '.join(CHOICES)}"
            )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} would keep none; set it to 1 or more")
        if self.max_file_gb <= 0:
            raise ValueError(f"checkpoint.max_file_gb={self.max_file_gb}: set it above 0")
