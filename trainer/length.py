"""How long a run is: in steps, or in epochs, whose steps are counted when the data is there."""

import math
from collections.abc import Mapping
from fractions import Fraction

from trainer.data.loader import StepLoader
from trainer.data.named_sources import Source


def check_length(max_steps: int | None, max_epochs: float | None) -> None:
    """Raise ValueError unless exactly one of both is given."""
    if max_steps is None and max_epochs is None:
        raise ValueError("max_steps and max_epochs are both null; set one of them")
    if max_steps is not None and max_epochs is not None:
        raise ValueError(
            f"max_steps={max_steps} and max_epochs={max_epochs:g} are two lengths of one run; set "
            "one of them to null"
        )


def check_epochs(max_epochs: float | None, sources: Mapping[str, Source]) -> None:
    """Raise ValueError for epochs of sources that have none together."""
    for name, source in sources.items():
        if max_epochs is not None and source.weight is not None:
            raise ValueError(
                f"max_epochs={max_epochs:g} has no meaning with "
                f"data.sources.{name}.weight={source.weight:g}, as each source ends at another "
                "time; set max_steps, or data.sources.NAME.epochs in place of the weights"
            )


def steps_of(max_epochs: float, loader: StepLoader) -> int:
    """Return how many steps go through all sources so often; the last one may begin another epoch,
    as all have the same size."""
    # Without weights the shares are samples: of one epoch, over all sources.
    samples = Fraction(str(max_epochs)) * sum(loader.weights)
    return math.ceil(samples / loader.global_samples)
