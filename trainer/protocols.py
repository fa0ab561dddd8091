"""The engine, and a save, as the loop, the checkpoint and the callbacks see them."""

from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from models.nn.cache import Cache
from models.nn.head import Loss
from trainer.batch import Batch
from trainer.pieces import Piece


class StepResult(NamedTuple):
    """What one optimizer step did. Tensors are 0-dim if nothing is said, on the device, and equal
    on every rank."""

    loss_sum: Tensor
    """Sum over all targets of the step and all ranks, fp64."""
    num_targets: Tensor
    num_tokens: Tensor
    """Tokens of the step over all ranks, padding left out."""
    num_onlookers: Tensor
    """Tokens that look at an image."""
    num_images: Tensor
    """Images that are looked at: blank ones, which fill rows up, are left out."""
    grad_norm: Tensor
    """Global norm before clipping."""
    skipped: Tensor
    """True when loss or gradient was not finite or a spike, and nothing was updated."""
    lr: float
    flags: Tensor
    """What was wrong with the numbers, as `numerics.spike.Flag`; 0: nothing."""
    by_source: Tensor
    """(2, sources) fp64, the loss sum and the targets of each source; no source where there is one
    alone."""


class Saved(NamedTuple):
    """How the save of a step ended, equal on every rank but for the times."""

    step: int
    folder: Path | None
    """Where it is; None: it failed."""
    num_failures: int
    """Saves that failed in a row, this one included."""
    seconds_paused: float
    """How long training waited for it."""
    seconds_written: float
    """How long it took in the background; known on rank 0."""


class Engine(Protocol):
    """Owns wrapping, gradient sync, scaling, norm and clip, the update and the keyed RNG.

    Owns no data, no loss definition and no log. All methods are collective.
    """

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        """Run optimizer step number `step` (from 1) on this rank's micro-batches."""
        ...

    def eval_step(self, batch: Batch) -> Loss:
        """Return this rank's loss on `batch`, without gradients."""
        ...

    def logits(self, batch: Batch) -> Tensor:
        """Return the (B, T, V) logits, the same on every rank that passes the same batch."""
        ...

    def new_cache(self) -> Cache | None:
        """Return an empty cache for `next_logits`; None where positions are all computed anew."""
        ...

    def next_logits(self, batch: Batch, cache: Cache | None) -> Tensor:
        """Return the (B, V) logits of what follows each row; the cache takes the batch in.

        Rows may be padded in front.
        """
        ...

    def weights(self) -> dict[str, Piece]:
        """Return this rank's piece of every weight, by Hugging Face name.

        Its `local` is written through.
        """
        ...

    def optimizer_state(self) -> dict[str, Piece]:
        """Return this rank's pieces of the optimizer state, as `kind/parameter name`."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this rank writes the rows of pieces that are its own: its copy is the first."""
        ...

    def loaded(self) -> None:
        """Take over what was written into the pieces that both last returned."""
        ...

    def close(self) -> None:
        """Let go of what would outlive this engine; it is not used again."""
        ...
