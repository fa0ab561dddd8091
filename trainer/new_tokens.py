"""Rows for new tokens beside a frozen model: which train, and what they start from."""

from functools import cache

import torch
from torch import Tensor, nn

from models.nn.decoupled import additional_rows, new_rows
from trainer.parallel.materialise import Values

ROWS = (".additional_embedding.weight", ".additional_fc.weight")
CHUNK = 1 << 22  # elements that are read at a time


def train_new_rows(model: nn.Module) -> None:
    """Freeze all but additional rows and a head that is no lm_head, in place."""
    rows = [parameter for name, parameter in model.named_parameters() if name.endswith(ROWS)]
    if not rows:
        raise ValueError(
            "freeze.new_tokens=true and the model has no new rows; name the tokens: "
            'model.additional_tokens=["<a>","<b>"]'
        )
    model.requires_grad_(False)
    head = model.get_submodule(str(model.head_name))
    for parameter in (*rows, *(head.parameters() if model.head_name != "lm_head" else ())):
        parameter.requires_grad_(True)


def starting_at_mean(model: nn.Module, values: Values, given: frozenset[str]) -> Values:
    """Return what the planned model starts from: new rows at the mean of the rows before them.

    So do a family's own additional rows that are not `given` where the rows before them are.
    `values` gives all else. Every rank reads all rows, in one order, and sums them in fp64: the
    same bits on every layout.
    """
    parameters, new = dict(model.named_parameters()), new_rows(model)
    fronts = {
        name: front
        for name, front in additional_rows(model).items()
        if name not in given and (name in new or front in given)
    }

    @cache
    def mean_of(name: str) -> Tensor:
        rows, width = parameters[fronts[name]].shape
        step = max(1, CHUNK // width)
        total_D = torch.zeros(width, dtype=torch.float64)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = values(fronts[name], first * width, last * width)
            total_D += part.view(-1, width).double().sum(0)
        return total_D / rows

    def value(name: str, start: int, stop: int) -> Tensor:
        if name not in fronts:
            return values(name, start, stop)
        return mean_of(name)[torch.arange(start, stop) % parameters[name].shape[1]]

    return value
