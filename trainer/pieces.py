"""The piece of a tensor that this rank holds, and where it lies in the whole."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether a weight is a scale, a bias or a gate: one number per feature, also where it has the
    shape of what it multiplies, as (1, 1, D). A matrix of one row or column is none."""
    return len(shape) < 2 or (len(shape) > 2 and max(shape) == math.prod(shape))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows [start, stop) of a tensor, seen as a matrix of shape[0] rows."""

    start: int
    stop: int
    is_own: bool = True
    """Whether this rank answers for them: of all ranks of one copy of the model, one does."""
    sum_over: tuple[tuple[str, dist.ProcessGroup], ...] = ()
    """Ranks that hold the same rows and whose gradients of them add up, by axis of the mesh."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of a tensor of `shape`, one run after the other, or a range of their columns.

    Each row has prod(shape[1:]) columns; a tensor without dimensions is one row with one column.
    """

    local: Tensor
    """The elements; aliases the parameter."""
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    columns: tuple[int, int]
    column_group: dist.ProcessGroup | None = None
    """The ranks that hold the other columns of the same rows, in order; None: there are none."""

    @staticmethod
    def of(tensor: Tensor, *, is_own: bool = True) -> "Piece":
        """Return all of `tensor` as a piece."""
        shape = tuple(tensor.shape)
        rows = (Rows(start=0, stop=shape[0] if shape else 1, is_own=is_own),)
        return Piece(local=tensor, shape=shape, rows=rows, columns=(0, math.prod(shape[1:])))

    def like(self, local: Tensor) -> "Piece":
        """Return `local` as a piece that lies as this one."""
        return replace(self, local=local)

    @property
    def num_rows(self) -> int:
        """Rows of the whole tensor."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Columns of the whole tensor."""
        return math.prod(self.shape[1:])

    @property
    def has_whole_rows(self) -> bool:
        return self.columns == (0, self.width)

    def own_elements(self, flat: Tensor, start: int) -> Iterator[Tensor]:
        """Yield what of `flat`, elements [start, ..) of the local tensor laid flat, is own."""
        width = self.columns[1] - self.columns[0]
        first = -start
        for rows in self.rows:
            last = first + len(rows) * width
            if rows.is_own and max(first, 0) < min(last, len(flat)):
                yield flat[max(first, 0) : last]
            first = last

    @cached_property
    def is_shared(self) -> bool:
        """Whether gradients of some of its rows add up over ranks."""
        return any(rows.sum_over for rows in self.rows)

    def split_own(self, local: Tensor) -> list[Tensor]:
        """Return those rows of `local`, which lies as this piece, that this rank answers for."""
        if len(self.rows) == 1:
            return [local] if self.rows[0].is_own else []
        parts = local.split([len(rows) for rows in self.rows])
        return [part for part, rows in zip(parts, self.rows, strict=True) if rows.is_own]

    def cut(self, read: Callable[[int, int], Tensor]) -> Tensor:
        """Return this piece's values; `read(start, stop)` gives elements of the flat tensor."""
        first, last = self.columns
        parts = [
            read(rows.start * self.width, rows.stop * self.width).view(len(rows), self.width)[
                :, first:last
            ]
            for rows in self.rows
        ]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.reshape(self.local.shape)

    def with_whole_rows(self) -> "Piece":
        """Exchange columns for rows over the ranks that share the rows: each gets some of them.

        Collective over `column_group`; without one the piece is returned as it is.
        """
        if self.column_group is None:
            return self
        size, rank = self.column_group.size(), self.column_group.rank()
        (rows,) = self.rows  # a split of columns never splits rows
        matrix = self.local.detach().view(len(rows), self.columns[1] - self.columns[0])
        sent = [part.contiguous() for part in matrix.tensor_split(size)]
        received = [torch.empty_like(sent[rank]) for _ in range(size)]
        dist.all_to_all(received, sent, group=self.column_group)
        start = rows.start + sum(len(part) for part in sent[:rank])
        return Piece(
            local=torch.cat(received, dim=1).cpu(),  # all of them at once may not fit a GPU
            shape=self.shape,
            rows=(Rows(start=start, stop=start + len(sent[rank])),),
            columns=(0, self.width),
        )
