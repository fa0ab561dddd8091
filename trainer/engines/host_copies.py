"""Weights on the host, for an optimizer that works there: `engine.offload_optimizer=true`."""

import torch
from torch import Tensor

from trainer.pieces import Piece


class HostCopies:
    """A copy of every piece in host memory; the optimizer and its state know nothing else."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        self.on_device = pieces
        self.pieces = {name: piece.like(_on_host(piece.local)) for name, piece in pieces.items()}
        self.buffers: dict[str, Tensor] = {}

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return a copy of a gradient, on its way: `wait` before it is read."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(self.pieces[name].local, pin_memory=_pins())
        return self.buffers[name].copy_(gradient, non_blocking=True)

    def wait(self) -> None:
        """Wait until the gradients are here."""
        if _pins():
            torch.cuda.synchronize()  # sync: the update needs them

    @torch.no_grad()
    def push(self) -> None:
        """Write the updated weights to the device."""
        for name, piece in self.pieces.items():
            self.on_device[name].local.copy_(piece.local, non_blocking=True)
        self.wait()  # the next update must not overtake the copies

    @torch.no_grad()
    def pull(self) -> None:
        """Take over weights that were loaded on the device."""
        for name, piece in self.pieces.items():
            piece.local.copy_(self.on_device[name].local)


def _on_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=_pins())
    return host.copy_(tensor)


def _pins() -> bool:
    return torch.cuda.is_available()
