"""Pipeline parallelism: which layers are where, and a model of which only some are here.

The model keeps its code and its names. What another stage computes is replaced by a module that
hands on what it is given, so a stage is a model whose "token ids" are the hidden states of the
stage before.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.layout import Layout
from trainer.mesh import Mesh
from trainer.parallel.pieces import tied_names, unique_parameters
from trainer.pieces import Piece, Rows


class Elsewhere(nn.Module):
    """Stands for a module of another stage: hands on its first input."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


class NoPositions(nn.Module):
    """Stands for a table of positions on later stages, whose input has them already."""

    def forward(self, _: Tensor) -> float:
        return 0.0


class Stages:
    """The stages of this rank: parts of one meta model."""

    def __init__(self, model: nn.Module, layout: Layout, mesh: Mesh, chunks: int) -> None:
        """`chunks`: stages per rank, interleaved. Collective: it may make groups of ranks."""
        self.layout, self.mesh = layout, mesh
        self.num_stages = mesh.size("pp") * chunks
        self.hidden_size = model.get_submodule(layout.norm).get_parameter("weight").shape[0]
        self.ties = tied_names(model)
        self.ends = mesh.pp_ends() if self.ties else None
        self.planned = {
            name: (Piece.of(p), p.requires_grad) for name, p in unique_parameters(model)
        }
        """Every parameter of the whole model in its order, and whether it trains."""
        self.indices = [mesh.rank("pp") + chunk * mesh.size("pp") for chunk in range(chunks)]
        self.parts = [self._part(model, index) for index in self.indices]

    def name(self, own: str) -> str:
        """Return the name in the whole model of what a part calls `own`."""
        return self.ties.get(own, own)

    def _part(self, model: nn.Module, index: int) -> nn.Module:
        """Return the model with what is on other stages taken out."""
        part = deepcopy(model) if len(self.indices) > 1 else model
        layout, is_first, is_last = self.layout, index == 0, index == self.num_stages - 1
        lists = [
            pattern.removesuffix(".*")
            for pattern in layout.blocks
            if not pattern.startswith(tuple(layout.replicated) or ("\0",))
        ]
        blocks = [part.get_submodule(name) for name in lists]
        num_layers = _length(blocks[0])
        own = set(torch.arange(num_layers).tensor_split(self.num_stages)[index].tolist())
        for name, several in zip(lists, blocks, strict=True):
            stride = -(-num_layers // _length(several))  # every stride-th layer has one of these
            for place in range(_length(several)):
                if place * stride not in own:
                    part.set_submodule(f"{name}.{place}", Elsewhere())
        if not is_first:
            part.set_submodule(layout.embedding, Elsewhere())
            for name in layout.positions:
                part.set_submodule(name, NoPositions())
            for name, module in list(part.named_modules()):
                if isinstance(module, nn.Dropout) and not name.startswith(tuple(lists)):
                    part.set_submodule(name, Elsewhere())
        if not is_last:
            part.set_submodule(layout.norm, Elsewhere())
            part.set_submodule(str(part.head_name), Elsewhere())
        return part

    def shared(self, name: str, piece: Piece) -> Piece:
        """Return the piece as other stages share it: their gradients are summed, one answers."""
        is_everywhere = name.startswith(tuple(f"{part}." for part in self.layout.replicated))
        is_at_both_ends = name in self.ties.values()
        if not (is_everywhere or is_at_both_ends):
            return piece
        group = self.mesh.group("pp") if is_everywhere else self.ends
        assert group is not None
        axis = "pp" if is_everywhere else "pp_ends"
        is_first = self.mesh.rank("pp") == 0
        rows = tuple(
            replace(r, is_own=r.is_own and is_first, sum_over=(*r.sum_over, (axis, group)))
            for r in piece.rows
        )
        return replace(piece, rows=rows)


def absent(piece: Piece) -> Piece:
    """Return what this rank holds of a parameter of another stage: nothing, of a known shape."""
    return Piece(
        local=torch.empty((0, *piece.shape[1:]), dtype=piece.local.dtype),
        shape=piece.shape,
        rows=(Rows(start=0, stop=0, is_own=False),),
        columns=(0, piece.width),
    )


def num_scheduled(micro_batches: int, pp: int, chunks: int) -> int:
    """Return the fewest micro-batches, from `micro_batches` on, that the schedules take.

    1F1B takes any number that fills the pipeline once, the interleaved one equal rounds of pp or
    more.
    """
    return next(
        number
        for number in count(max(micro_batches, pp))
        if chunks == 1 or number % (number // pp) == 0
    )


def _length(blocks: nn.Module) -> int:
    return len(list(blocks.children()))


class Relay:
    """Carries hidden states forward through all stages, for what needs no backward pass."""

    def __init__(self, stages: Stages, device: torch.device, dtype: torch.dtype) -> None:
        self.stages, self.device, self.dtype = stages, device, dtype
        self.group, self.size = stages.mesh.group("pp"), stages.mesh.size("pp")
        self.rank = stages.mesh.rank("pp")

    @torch.no_grad()
    def run(
        self, called: list[nn.Module], ids_BT: Tensor, shape: tuple[int, ...], **inputs: Any
    ) -> Any:
        """Return the last stage's result there, None elsewhere; hidden states have `shape`."""
        result: Any = None
        for index, part in zip(self.stages.indices, called, strict=True):
            hidden = ids_BT
            if index > 0:
                hidden = torch.empty(shape, device=self.device, dtype=self.dtype)
                dist.recv(hidden, group=self.group, group_src=(self.rank - 1) % self.size)
            result = part(hidden, **inputs)
            if index < self.stages.num_stages - 1:
                last = (self.rank + 1) % self.size
                dist.send(result.contiguous(), group=self.group, group_dst=last)
                result = None
        return result

    def spread(self, tensor: Tensor) -> Tensor:
        """Return the last stage's tensor on every stage, in place."""
        dist.broadcast(tensor, group=self.group, group_src=self.size - 1)
        return tensor
