"""What a run does about steps whose numbers were wrong. Every rank comes to the same."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.commit import committed_steps
from trainer.control import HostResult
from trainer.data.loader import StepLoader
from trainer.distributed import Ranks
from trainer.errors import NumericError
from trainer.numerics.rewinds import rewinds_of
from trainer.numerics.spike import REWIND, SPIKE, STOP, SpikeSpec, words_of

log = logging.getLogger(__name__)
MAX_PLACES = 4  # of rows, that a message names


class RewindError(Exception):
    """Not an end: the run is to go on from the newest checkpoint that is intact of `steps`."""

    def __init__(self, spike: int, steps: list[int], why: str) -> None:
        super().__init__(f"step {spike}: {why}; back to the checkpoint of step {steps[0]}")
        self.spike, self.steps, self.why = spike, steps, why


@dataclass(kw_only=True)
class Watch:
    """Follows the results of steps, each once, in their order."""

    spike: SpikeSpec
    max_skipped_in_a_row: int
    checkpoints: Path
    """Folder of the checkpoints."""
    settle: Callable[[], None]
    """Waits for the save under way. Collective."""
    ranks: Ranks
    skipped_in_a_row: int = 0

    def note(self, result: HostResult, loader: StepLoader) -> None:
        """Take a step of this loader in.

        Raises NumericError where it ends the run, RewindError where the run has to go back; to find
        that out is collective.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        is_spike = bool(result.flags & SPIKE)
        is_last = self.skipped_in_a_row >= self.max_skipped_in_a_row
        if self.spike.policy == REWIND and (is_spike or is_last):
            self._rewind(result, loader)
        if is_last or (is_spike and self.spike.policy == STOP):
            raise NumericError(self._words(result, loader))

    def _rewind(self, result: HostResult, loader: StepLoader) -> None:
        """Raise RewindError, or say that there is nothing to go back to."""
        assert self.spike.steps_back is not None
        assert self.spike.max_rewinds is not None
        self.settle()  # the step that is being saved may be the one to go back to
        # Rank 0 looks for all: a shared file system need not show every rank the same.
        latest = result.step - self.spike.steps_back
        steps = [step for step in committed_steps(self.checkpoints) if step <= latest]
        steps = json.loads(self.ranks.broadcast_text(json.dumps(steps)))
        if not steps:
            log.warning(
                "step %d: %s; skipped, since no checkpoint lies %d steps before it",
                result.step, words_of(result.flags), self.spike.steps_back,
            )  # fmt: skip
            return
        rewinds = rewinds_of(self.checkpoints.parent, self.ranks)
        spikes = rewinds[steps[0]].spikes if steps[0] in rewinds else ()
        if len(spikes) >= self.spike.max_rewinds:
            raise NumericError(
                f"{self._words(result, loader)}. The run went back to step {steps[0]} "
                f"{len(spikes)} times already (from steps {', '.join(map(str, spikes))}; "
                "spike.max_rewinds)"
            )
        raise RewindError(result.step, steps, words_of(result.flags))

    def _words(self, result: HostResult, loader: StepLoader) -> str:
        """Say which steps, on which samples, from where, and what to do."""
        count = max(1, self.skipped_in_a_row)
        steps = range(result.step - count + 1, result.step + 1)
        found = [loader.samples(step - 1) for step in steps]
        samples = ", ".join(f"{of_step.start}-{of_step.stop - 1}" for of_step in found)
        places = [place for step in steps for place in loader.provenance(step - 1)]
        more = f" and {len(places) - MAX_PLACES} rows more" if len(places) > MAX_PLACES else ""
        named = f"steps {steps[0]} to {steps[-1]}" if count > 1 else f"step {steps[0]}"
        return (
            f"{named}: {words_of(result.flags)} ({count} in a row; loss sum {result.loss_sum:g}, "
            f"gradient norm {result.grad_norm:g}), nothing was updated; samples {samples}, from "
            f"{', '.join(places[:MAX_PLACES])}{more}; look at them with tessera replay "
            f"run={self.checkpoints.parent} step={steps[0]}, correct the data or lower optim.lr"
        )
