"""Muon: momentum whose matrices are made orthogonal, on whichever rank has the least to do.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); scale and decay: Liu et al. 2025,
"Muon is Scalable for LLM Training" (arXiv 2502.16982).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optimizers.matrices import Stacked
from trainer.optimizers.moments import PlainMoment, as_rows, write
from trainer.optimizers.place import Place
from trainer.optimizers.rounding import Noise
from trainer.optimizers.states import make_state
from trainer.pieces import Piece

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's quintic: singular values come to between 0.7 and 1.2 in five steps, none to 1."""
SMALLEST_NORM = 1e-7
RMS = 0.2
"""Root mean square of an update over the learning rate, as AdamW's is: one rate serves both."""


class MuonOptimizer:
    """Muon over the pieces of matrices, another optimizer over the rest.

    A matrix is put together on one rank, made orthogonal there, and sent to all. So the numbers are
    those of one process on every layout, and no rank does the work of another.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        pieces: dict[str, Piece],
        rest: Any,
        *,
        matrices: dict[str, Stacked],
        place: Place,
        momentum: float,
        num_iterations: int,
    ) -> None:
        """`groups` are torch's, of Muon's weights: params, lr and weight_decay. `rest`: the
        optimizer of all other weights; None: there are none."""
        self.groups, self.rest, self.momentum = groups, rest, momentum
        self.param_groups = [*groups, *(rest.param_groups if rest else ())]
        self.found_inf: Tensor | None = None
        self.num_iterations = num_iterations
        self.matrices = {
            name: _Matrix(name, piece, matrices[name], place) for name, piece in pieces.items()
        }
        self.state = {
            matrix.piece.local: {"step": matrix.step, **matrix.mean.tensors("momentum_buffer")}
            for matrix in self.matrices.values()
        }
        if rest:
            make_state(rest)
            self.state |= rest.state
        self.exchange = Exchange(place, {name: piece.shape for name, piece in pieces.items()})

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient. Collective over the ranks of one stage."""
        if self.rest:
            self.rest.found_inf = self.found_inf
            self.rest.step()
        skip = None if self.found_inf is None else self.found_inf.bool()
        rates = {
            weight: (group["lr"], group["weight_decay"])
            for group in self.groups
            for weight in group["params"]
        }
        moved = {n: m for n, m in self.matrices.items() if m.piece.local.grad is not None}
        wholes = {}
        for name, matrix in moved.items():
            whole = matrix.place_in_whole(matrix.direction(self.momentum, skip), self.exchange)
            if self.exchange.to_owner(name, whole):
                wholes[name] = whole
        for name, matrix in moved.items():
            if name in wholes:
                update = matrix.orthogonal(wholes.pop(name), self.num_iterations)
            else:
                update = matrix.rows.new_empty(matrix.piece.shape, dtype=matrix.dtype)
            self.exchange.to_all(name, update)
            matrix.update(update, *rates[matrix.piece.local], skip)


class _Matrix:
    """One weight, its momentum, and what lies where."""

    def __init__(self, name: str, piece: Piece, stacked: Stacked, place: Place) -> None:
        self.piece, self.stacked = piece, stacked
        self.rows = as_rows(piece.local, piece)
        self.wide = torch.promote_types(piece.local.dtype, torch.float32)
        self.dtype = place.compute
        self.mean = PlainMoment(piece, piece.local.dtype, use=1)
        self.step = torch.zeros((), dtype=torch.float32, device=piece.local.device)
        is_narrow = piece.local.dtype == torch.bfloat16
        self.noise = Noise(piece, name, place.seed) if is_narrow else None

    def direction(self, momentum: float, skip: Tensor | None) -> Tensor:
        """Take the gradient into the running mean; return Nesterov's look ahead."""
        assert self.piece.local.grad is not None
        self.step.add_(1.0 if skip is None else 1.0 - skip.float())
        gradient = as_rows(self.piece.local.grad.contiguous(), self.piece).to(self.wide)
        mean = self.mean.read(0, len(self.rows), self.wide).mul_(momentum)
        mean.add_(gradient * (1 - momentum))
        self.mean.write(0, len(self.rows), mean, bits=self._bits(), skip=skip)
        return mean.mul_(momentum).add_(gradient * (1 - momentum))

    def place_in_whole(self, rows: Tensor, exchange: "Exchange") -> Tensor:
        """Return a whole matrix with what this rank answers for in its place, and zeros."""
        if not exchange.is_cut:
            return rows.to(self.dtype)
        whole = rows.new_zeros(self.piece.shape, dtype=self.dtype)
        first, last = self.piece.columns
        at = 0
        for run in self.piece.rows:
            if run.is_own and exchange.is_first_copy:
                whole[run.start : run.stop, first:last] = rows[at : at + len(run)]
            at += len(run)
        return whole

    def orthogonal(self, whole: Tensor, num_iterations: int) -> Tensor:
        """Return the update of a whole weight, over its learning rate."""
        return self.stacked.join(
            [
                newton_schulz(matrix, num_iterations).mul_(RMS * math.sqrt(max(matrix.shape)))
                for matrix in self.stacked.split(whole)
            ]
        )

    def update(self, whole: Tensor, lr: float, decay: float, skip: Tensor | None) -> None:
        """Move this rank's piece by its part of the update."""
        flat = whole.reshape(-1)
        change = as_rows(self.piece.cut(lambda start, stop: flat[start:stop]), self.piece)
        new = self.rows.to(self.wide, copy=True).mul_(1 - lr * decay)
        new.sub_(change.to(self.wide) * lr)
        write(self.rows, new, self._bits(), 0, skip)

    def _bits(self) -> Tensor | None:
        return self.noise.bits(self.step, 0, len(self.rows)) if self.noise else None


def newton_schulz(matrix: Tensor, num_iterations: int) -> Tensor:
    """Return the matrix with all singular values near 1, computed in its dtype."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / norm.clamp(min=SMALLEST_NORM).to(x.dtype)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).contiguous()


class Exchange:
    """Sends matrices between the ranks that hold the same layers: who owns which, by its work."""

    def __init__(self, place: Place, shapes: dict[str, tuple[int, ...]]) -> None:
        mesh = place.mesh
        self.group = mesh.stage_group() if mesh else None
        self.is_cut = bool(mesh and (mesh.is_sharded or mesh.size("tp") > 1))
        """Whether a rank may hold less than all of a matrix."""
        self.is_first_copy = mesh is None or mesh.is_first_copy
        size = dist.get_world_size(self.group) if self.group else 1
        self.rank = dist.get_rank(self.group) if self.group else 0
        self.owners = dict(_balanced(shapes, size))

    def to_owner(self, name: str, whole: Tensor) -> bool:
        """Add up what the ranks have of a matrix; return whether this rank owns it. Collective."""
        if self.is_cut:
            dist.reduce(whole, group_dst=self.owners[name], group=self.group)
        return self.owners[name] == self.rank

    def to_all(self, name: str, whole: Tensor) -> None:
        """Fill `whole` with what the owner has. Collective."""
        if self.group is not None:
            dist.broadcast(whole, group_src=self.owners[name], group=self.group)


def _balanced(shapes: dict[str, tuple[int, ...]], size: int) -> Iterator[tuple[str, int]]:
    """Yield an owner for each matrix: the largest first, each to who has the least work."""
    work = [0] * size
    costs = {name: max(shape) * min(shape) ** 2 for name, shape in shapes.items()}
    for name in sorted(shapes, key=lambda name: (-costs[name], name)):
        owner = work.index(min(work))
        work[owner] += costs[name]
        yield name, owner
