"""What is trained: which head on a model, and what its evaluations say beside the loss."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol

from torch import nn

from models.heads import CausalLMSpec
from trainer.data.examples import Labels


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

    def eval_metrics(self, nll_sum: float, num_targets: int, num_bytes: int) -> dict[str, float]:
        """Return what an evaluation says beside the loss, by name."""
        ...
