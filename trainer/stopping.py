"""How a run ends before its last step: a signal or the limit of time, agreed by all ranks.

Who only waits must not be waited for: a rank asks whether it is to stop while its data is late, and
at every batch of an evaluation.
"""

import time
from dataclasses import dataclass

from trainer.control import ControlWord, StopRequest, Word
from trainer.data.loader import Step
from trainer.data.prefetch import Ahead
from trainer.time_limit import TimeLimit
from trainer.whereabouts import Whereabouts

_POLL_SECONDS = 0.1
ANOTHER_RANK, TIME_LIMIT = "a signal to another rank", "its time limit"


class EvaluationStoppedError(Exception):
    """An evaluation is abandoned, on all ranks at the same batch: it is repeated after a resume."""


@dataclass(kw_only=True)
class Stopping:
    """Whether the run is to end early: what this rank says, and what all ranks came to."""

    control: ControlWord
    request: StopRequest
    limit: TimeLimit
    whereabouts: Whereabouts
    is_agreed: bool = False
    """All ranks stop here."""
    is_too_late: bool = False
    """A save would not end in time."""
    _is_scarce: bool = True
    _began: float = 0.0

    def next(self, steps: Ahead[Step]) -> Step | None:
        """Return the data of the next step; None where the ranks stop while one of them lacks it.

        Collective, where the data of some rank was scarce two steps ago: ranks that began a step
        cannot leave it, so they ask the late one first. Else nobody waits.
        """
        self._began = time.monotonic()
        while not steps.wait(_POLL_SECONDS) and not self._wants_to_stop():
            pass
        if self._is_scarce:
            if self.control.ranks.placement.world_size > 1:
                self.whereabouts.enter("data_of_others")
            self.hear(self.control.agree(self._word(is_scarce=True)))
        return None if self.is_agreed else next(steps)

    def word(self, steps: Ahead[Step]) -> Word:
        """Return what this rank says after a step."""
        self.request.is_polled = True
        self.limit.took(step=time.monotonic() - self._began)
        return self._word(is_scarce=not steps.has_spare)

    def hear(self, word: Word) -> None:
        """Take in what all ranks said."""
        self.is_agreed = self.is_agreed or word.stop
        self.is_too_late, self._is_scarce = word.too_late, word.scarce
        if self.is_agreed and not self.request.reason:
            self.request.reason = TIME_LIMIT if word.is_limit else ANOTHER_RANK

    def poll(self) -> None:
        """Say that this rank is at work; raise EvaluationStoppedError where all ranks stop.

        Collective: every rank must call this as often.
        """
        self.whereabouts.beat()
        self.hear(self.control.exchange(self._word(is_scarce=True)))
        if self.is_agreed:
            raise EvaluationStoppedError

    def _word(self, *, is_scarce: bool) -> Word:
        return Word(
            stop=self._wants_to_stop(), is_limit=self.request.reason == TIME_LIMIT,
            too_late=self.limit.is_too_late, scarce=is_scarce,
        )  # fmt: skip

    def _wants_to_stop(self) -> bool:
        if self.limit.is_near and not self.request.reason:
            self.request.reason = TIME_LIMIT
        is_asked = self.request.is_set and self.request.is_polled
        return is_asked or self.request.reason == TIME_LIMIT
