"""What the settings of an adapter must offer, and the choice of none."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from models.layout import Layout
from trainer.parallel.materialise import Values


class AdapterSpec(Protocol):
    """What is added to a planned model, and what of it trains."""

    @property
    def lr_ratios(self) -> dict[str, float]:
        """Learning rates over optim.lr, by the ending of parameter names; others have 1."""
        ...

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Endings of names of parameters that weight decay spares, whatever their shape."""
        ...

    @property
    def base_hash(self) -> str | None:
        """Hash of the base that a given adapter belongs to; None: not known."""
        ...

    def apply(self, model: nn.Module, layout: Layout) -> None:
        """Freeze the planned model and add what trains, in place; ValueError: it does not fit."""
        ...

    def values(self, model: nn.Module, values: Values) -> Values:
        """Return what the adapted `model` starts from; `values` gives what its base does."""
        ...

    def peft_config(self, model: nn.Module) -> dict[str, Any] | None:
        """Return adapter_config.json of the adapted model; None where the whole model is saved."""
        ...


@dataclass(frozen=True, kw_only=True)
class NoAdapter:
    """The model trains itself, but for what `freeze` says."""

    @property
    def lr_ratios(self) -> dict[str, float]:
        return {}

    @property
    def undecayed(self) -> tuple[str, ...]:
        return ()

    @property
    def base_hash(self) -> str | None:
        return None

    def apply(self, model: nn.Module, layout: Layout) -> None:
        """Change nothing."""

    def values(self, model: nn.Module, values: Values) -> Values:
        return values

    def peft_config(self, model: nn.Module) -> dict[str, Any] | None:
        return None
