"""From a planned model on the meta device to real weights, the same on every layout."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from models.lora import packed_linears
from models.nn.init import initial_values, initializers
from trainer.parallel.pieces import Splits, piece_of, tied_names, unique_parameters

Values = Callable[[str, int, int], Tensor]
"""Returns elements [start, stop) of the named parameter, flattened, on the CPU."""


def materialise(
    model: nn.Module, device: torch.device, values: Values, splits: Splits | None = None
) -> None:
    """Allocate this rank's pieces on `device` and fill them with `values`. No communication.

    Weights that are kept in few bits come first, one at a time: their model is never there whole.
    """
    for name, linear in packed_linears(model).items():
        shape = linear.weight.shape
        linear.hold(values(f"{name}.weight", 0, shape.numel()).view(shape).to(device))
    ties = tied_names(model)
    kept = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        if name in kept:  # computed when the model was built, not planned
            buffer.copy_(kept[name])
    for alias, name in ties.items():
        _tie(model, alias, name)
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset(device)
    for name, parameter in unique_parameters(model):
        piece = piece_of(parameter, (splits or {}).get(name))
        piece.local.copy_(piece.cut(partial(values, name)))


def random_values(model: nn.Module, std: float, seed: int) -> Values:
    """Return the initial values of every parameter, keyed by its name."""
    inits = initializers(model, std)
    return lambda name, start, stop: initial_values(name, inits[name], seed, start, stop)


def _tie(model: nn.Module, alias: str, name: str) -> None:
    """Make `alias` the same object as `name` again: to_empty unties plain modules (torch 2.13)."""
    module_name, _, attribute = alias.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, model.get_parameter(name))
    assert model.get_parameter(alias) is model.get_parameter(name)
