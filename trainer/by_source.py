"""How losses of several sources are named: the same in training as in an evaluation."""

import math
from collections.abc import Sequence


def by_source(names: Sequence[str], sums: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """Return `loss/NAME` and `num_targets/NAME` of each source.

    `sums` are (2, sources): of losses in nats, and of targets. A number of targets that is NaN is
    not known: that source has no columns.
    """
    found: dict[str, float | int] = {}
    for name, total, count in zip(names, *sums, strict=True):
        if not math.isnan(count):
            found[f"loss/{name}"] = mean(total, count)
            found[f"num_targets/{name}"] = int(count)
    return found


def mean(total: float, count: float) -> float:
    """Return the loss of a target; NaN where there is none."""
    return total / count if count else math.nan
