"""What all ranks agree on once per step: stop. And the step's numbers, read without a GPU sync."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import Ranks
from trainer.protocols import StepResult


@dataclass
class StopRequest:
    """Set by a signal handler of this process; nothing else may be done there."""

    is_set: bool = False
    is_polled: bool = False
    """Whether the loop looks here: from the end of the first step on. Before, the handler raises
    StoppedEarlyError."""
    reason: str = ""
    """What asked for it, in words: a signal, or the limit of time."""


class Word(NamedTuple):
    """What a rank has to say after a step; of all ranks together, what any of them said."""

    stop: bool = False
    """Save, and end."""
    is_limit: bool = False
    """It is the limit of time that says so."""
    too_late: bool = False
    """A save would not end before the limit of time: end without."""
    scarce: bool = False
    """The data of the next two steps is not all there: ranks ask each other before they begin."""
    save_wanted: int = 0
    """Number of the save that the clock of rank 0 asks for; 0: none."""
    saved: int = 0
    """Number of the save that rank 0's writer has committed; 0: none is new."""
    save_failed: int = 0
    """Number of the save whose part could not be written on this rank; 0: none."""


class ControlWord:
    """One small all-reduce per step on the gloo side group, read one step late.

    Never a device sync, and never a rank that acts alone: what a rank says counts only once every
    rank has read it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sent: tuple[Tensor, dist.Work] | None = None

    def exchange(self, own: Word) -> Word:
        """Send this rank's word; return what was said a step ago. Collective."""
        if self.ranks.placement.world_size == 1:
            return own
        agreed = self._finish()
        word = torch.tensor(own, dtype=torch.int64)
        group = self.ranks.control_group
        self._sent = word, dist.all_reduce(word, dist.ReduceOp.MAX, group=group, async_op=True)
        return agreed

    def agree(self, own: Word) -> Word:
        """Return what the ranks say now, after waiting for all of them. Collective."""
        if self.ranks.placement.world_size == 1:
            return own
        return _word(self.ranks.maximum([int(each) for each in own]))

    def _finish(self) -> Word:
        if self._sent is None:
            return Word(scarce=True)  # nothing is known of the others
        word, work = self._sent
        work.wait()
        self._sent = None
        return _word(word.tolist())

    def drain(self) -> None:
        """Complete the exchange in flight, so that none is left when the ranks part. Collective."""
        self._finish()


def _word(numbers: list[int]) -> Word:
    stop, is_limit, too_late, scarce, *of_saves = numbers
    return Word(bool(stop), bool(is_limit), bool(too_late), bool(scarce), *of_saves)


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """A StepResult as plain numbers."""

    step: int
    loss_sum: float
    num_targets: int
    grad_norm: float
    skipped: bool
    flags: int = 0
    """What was wrong, as `numerics.spike.Flag`."""


class Readback:
    """Brings each StepResult to the host one step late, by a copy that nobody waits for."""

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def push(self, step: int, result: StepResult) -> HostResult | None:
        """Start the copy of this step's numbers; return the previous step's."""
        previous = self.flush()
        values = torch.stack(
            [
                result.loss_sum,
                result.num_targets.double(),
                result.grad_norm.double(),
                result.skipped.double(),
                result.flags.double(),
            ]
        )
        event = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, values, event)
        return previous

    def flush(self) -> HostResult | None:
        """Return the step still under way, if any."""
        if self._pending is None:
            return None
        step, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()  # of the step before: it has long passed
        loss_sum, num_targets, grad_norm, skipped, flags = values.tolist()
        return HostResult(
            step=step,
            loss_sum=loss_sum,
            num_targets=int(num_targets),
            grad_norm=grad_norm,
            skipped=bool(skipped),
            flags=int(flags),
        )
