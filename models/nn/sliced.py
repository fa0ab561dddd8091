"""Linears computed in slices on one device: the oracle of their tensor-parallel forms."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def colwise(x_D: Tensor, linear: nn.Linear, slices: int) -> Tensor:
    """Compute the output features in `slices` row slices of the weight, and concatenate them."""
    if slices == 1:
        result: Tensor = linear(x_D)
        return result
    return torch.cat([F.linear(x_D, *part) for part in column_slices(linear, slices)], dim=-1)


def column_slices(linear: nn.Linear, slices: int) -> list[tuple[Tensor, Tensor | None]]:
    """Return (weight, bias) of each slice of the output features."""
    weights = linear.weight.chunk(slices)
    biases = [None] * slices if linear.bias is None else linear.bias.chunk(slices)
    return list(zip(weights, biases, strict=True))


def rowwise(x_F: Tensor, linear: nn.Linear, slices: int) -> Tensor:
    """Add up `slices` partial products over the input features, in order; then the bias."""
    if slices == 1:
        result: Tensor = linear(x_F)
        return result
    inputs, weights = x_F.chunk(slices, dim=-1), linear.weight.chunk(slices, dim=1)
    total = F.linear(inputs[0], weights[0])
    for part, weight in zip(inputs[1:], weights[1:], strict=True):
        total = total + F.linear(part, weight)
    return total if linear.bias is None else total + linear.bias


def check_slices(tp_slices: int, sizes: dict[str, int]) -> None:
    """Raise ValueError where `tp_slices` does not divide each of the named sizes."""
    if tp_slices < 1:
        raise ValueError(f"pretraining_tp={tp_slices} is not positive; set it to 1")
    for name, size in sizes.items():
        if size % tp_slices:
            raise ValueError(
                f"pretraining_tp={tp_slices} does not divide {name}={size}; "
                "set pretraining_tp to 1 or a common divisor"
            )
