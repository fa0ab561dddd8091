"""Where a model computes the real tokens of its micro-batches alone, and where padding too."""

from torch import nn

from models.nn.model import DecoderModel
from models.nn.unpadded import goes_by_document
from trainer.engines.protocol import Surroundings

ONE_SHAPE = ("pp", "cp", "tp")
"""Axes whose ranks share a row's layers, tokens or features, and expect one shape."""


def skip_padding(model: nn.Module, around: Surroundings, *, is_compiled: bool) -> None:
    """Let the planned model leave padding out, in place, where that is right and pays.

    On a CPU, whose attention goes document by document: a GPU would have to be waited for, to say
    how many tokens are real. Compiled blocks would be compiled for every number of them. With
    `topology_free` a document's bits may not depend on where its neighbours end.
    """
    keeps_shapes = (
        is_compiled
        or around.is_topology_free
        or around.device.type != "cpu"
        or any(around.mesh.size(axis) > 1 for axis in ONE_SHAPE)
    )
    if isinstance(model, DecoderModel):
        model.skips_padding = not keeps_shapes and goes_by_document(model.trunk)
        model.compute_dtype = around.precision.compute
