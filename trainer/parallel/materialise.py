"""From a planned model on the meta device to real weights, the same on every layout."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.nn.init import initial_stds, initial_values
from trainer.checkpoint.tensor_file import missing_and_unexpected, read_entries, read_piece
from trainer.parallel.pieces import named_pieces, piece_of, unique_parameters
from trainer.pieces import Piece

RANDOM = "random"

Values = Callable[[str, Piece], Tensor]
"""Returns elements [piece.start, piece.stop) of the named parameter, on the CPU."""


def materialise(model: nn.Module, device: torch.device, values: Values) -> None:
    """Allocate this rank's pieces on `device` and fill them with `values`. No communication."""
    ties = _tied_names(model)
    model.to_empty(device=device)
    for alias, name in ties.items():
        _tie(model, alias, name)
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset(device)
    for name, parameter in unique_parameters(model):
        piece = piece_of(parameter)
        piece.local.copy_(values(name, piece).view(piece.local.shape))


def random_values(model: nn.Module, std: float, seed: int) -> Values:
    """Return the initial values of every parameter, keyed by its name."""
    stds = initial_stds(model, std)
    return lambda name, piece: initial_values(name, stds[name], seed, piece.start, piece.stop)


def file_values(folder: Path) -> Values:
    """Return the weights of the safetensors files of `folder`, in Hugging Face layout."""
    entries = read_entries(folder)
    return lambda name, piece: read_piece(folder, entries[name], piece, name)


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise ValueError where a tensor in the files of `folder` does not fit the planned model."""
    entries = read_entries(folder) if folder.is_dir() else {}
    if not entries:
        raise ValueError(
            f"weights={folder} holds no safetensors file; "
            "give a folder that does, or weights=random"
        )
    wanted = named_pieces(unique_parameters(model))
    if problems := list(missing_and_unexpected(entries, wanted)):
        raise ValueError(
            f"weights={folder}: {problems[0]} ({len(problems)} such tensors); "
            "choose the model that these weights belong to"
        )
    for name, piece in wanted.items():
        if entries[name].shape != piece.shape:
            raise ValueError(
                f"weights={folder}: {name} has shape {list(entries[name].shape)}, the model needs "
                f"{list(piece.shape)}; choose the model that these weights belong to"
            )


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a shared parameter to its first one."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return ties


def _tie(model: nn.Module, alias: str, name: str) -> None:
    """Make `alias` the same object as `name` again: to_empty unties plain modules (torch 2.13)."""
    module_name, _, attribute = alias.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, model.get_parameter(name))
    assert model.get_parameter(alias) is model.get_parameter(name)
