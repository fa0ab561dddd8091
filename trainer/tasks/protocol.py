"""What is trained: which head on a model, and what its evaluations say."""

from dataclasses import Field, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from models.heads import CausalLMSpec
from trainer.batch import Batch
from trainer.data.examples import Labels
from trainer.protocols import Engine


class Judged(NamedTuple):
    """What an evaluation learns from one batch of this rank."""

    nll_sum: Tensor
    num_targets: Tensor
    answers: Tensor | None = None
    """(n, k) fp64, one row for each text or word that has a label; the first column is the place of
    its document in the evaluation. With answers, all is of whole rows, whatever ranks share
    them."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """An evaluation, over all batches and ranks."""

    nll_sum: float
    num_targets: int
    num_bytes: float
    """UTF-8 bytes of the text that was read, of a sample estimated; 0: unknown."""
    answers: np.ndarray | None
    """Of all batches and ranks, in the order of the first column."""
    labels: Labels | None

    @property
    def loss(self) -> float:
        return self.nll_sum / self.num_targets if self.num_targets else float("nan")


class Task(Protocol):
    """A task's settings. Reads `task.*` of the config."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def head(self) -> str:
        """Which head of models.heads it trains."""
        ...

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError where the data has not what the head learns, or the model no place."""
        ...

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> nn.Module:
        """Build trunk and head on torch's current default device; called after `check`."""
        ...

    def judge(self, engine: Engine, batch: Batch, number: int, labels: Labels | None) -> Judged:
        """Evaluate the batch number `number` of all ranks. Collective."""
        ...

    def metric_names(self, labels: Labels | None) -> tuple[str, ...]:
        """Return the names of the numbers of `eval_metrics`."""
        ...

    def eval_metrics(self, totals: Totals) -> dict[str, Any]:
        """Return what an evaluation says beside the loss, by name."""
        ...
