"""What this rank has of a model after it was laid out: modules, and the pieces they hold."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.parallel.materialise import Values, materialise
from trainer.parallel.pieces import Splits, piece_of, unique_parameters
from trainer.parallel.pipeline import Stages, absent
from trainer.pieces import Piece


class LaidOut:
    """The model's parts on this rank: itself, or the stages of a pipeline."""

    def __init__(self, parts: list[nn.Module], splits: list[Splits], stages: Stages | None) -> None:
        """`splits`: for each part, what it holds of its parameters, where that is not all."""
        self.parts, self.splits, self.stages = parts, splits, stages

    def fill(self, device: torch.device, values: Values) -> None:
        """Give the parts memory on `device` and the values of the whole model."""
        for part, splits in zip(self.parts, self.splits, strict=True):
            materialise(part, device, self._renamed(values), splits)

    def _renamed(self, values: Values) -> Callable[[str, int, int], Tensor]:
        def value(own: str, start: int, stop: int) -> Tensor:
            return values(self._name(own), start, stop)

        return value

    def _name(self, own: str) -> str:
        return self.stages.name(own) if self.stages else own

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are here, by their names in the whole model."""
        return {
            self._name(own): parameter
            for part in self.parts
            for own, parameter in unique_parameters(part)
        }

    def pieces(self) -> dict[str, Piece]:
        """Return this rank's piece of every parameter of the whole model, in its order."""
        here = {
            self._name(own): self._piece(own, parameter, splits)
            for part, splits in zip(self.parts, self.splits, strict=True)
            for own, parameter in unique_parameters(part)
        }
        if self.stages is None:
            return here
        return {
            name: here.get(name, absent(base)) for name, (base, _) in self.stages.planned.items()
        }

    def _piece(self, own: str, parameter: nn.Parameter, splits: Splits) -> Piece:
        base = splits.get(own) or Piece.of(parameter)
        if self.stages is not None:
            base = self.stages.shared(self._name(own), base)
        return piece_of(parameter, base)

    def trained(self) -> set[str]:
        """Return the names of all parameters that train, wherever they are."""
        if self.stages is not None:
            return {name for name, (_, trains) in self.stages.planned.items() if trains}
        return {name for name, parameter in self.parameters().items() if parameter.requires_grad}
