"""A running mean beside each weight, in one of three forms: as it is, in bf16, or in 8 bits."""

from typing import Protocol

import torch
from torch import Tensor

from trainer.optimizers.eight_bit import decode, encode, num_blocks
from trainer.optimizers.rounding import rounded
from trainer.pieces import Piece


class Moment(Protocol):
    """Rows of a piece, read and written a few at a time."""

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        ...

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return a copy of rows [first, last)."""
        ...

    def write(
        self, first: int, last: int, values: Tensor, *, bits: Tensor | None, skip: Tensor | None
    ) -> None:
        """Keep `values`, unless `skip` says that nothing may change."""
        ...


class PlainMoment:
    """Kept in one tensor like the weight; a bf16 one is rounded by chance.

    To the nearest, a mean that changes by less than 2^-9 of itself never would: with beta 0.999, no
    mean of squares would fall.
    """

    def __init__(self, piece: Piece, dtype: torch.dtype, use: int) -> None:
        self.values, self.use = torch.zeros_like(piece.local, dtype=dtype), use
        self.rows = as_rows(self.values, piece)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        return {kind: self.values}

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.rows[first:last].to(dtype, copy=True)

    def write(
        self, first: int, last: int, values: Tensor, *, bits: Tensor | None, skip: Tensor | None
    ) -> None:
        write(self.rows[first:last], values, bits, self.use, skip)


class CodedMoment:
    """Kept in 8 bits per element, with a scale for each block."""

    def __init__(self, piece: Piece, *, is_signed: bool) -> None:
        width = piece.columns[1] - piece.columns[0]
        self.is_signed = is_signed
        self.codes = torch.zeros_like(piece.local, dtype=torch.uint8)
        self.rows = as_rows(self.codes, piece)
        self.scales = piece.local.new_zeros(
            (len(self.rows), num_blocks(width)), dtype=torch.float32
        )

    def tensors(self, kind: str) -> dict[str, Tensor]:
        return {kind: self.codes, f"{kind}_scale": self.scales}

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        codes, scales = self.rows[first:last], self.scales[first:last]
        return decode(codes, scales, is_signed=self.is_signed).to(dtype)

    def write(
        self, first: int, last: int, values: Tensor, *, bits: Tensor | None, skip: Tensor | None
    ) -> None:
        codes, scales = encode(values, is_signed=self.is_signed)
        write(self.rows[first:last], codes, None, 0, skip)
        write(self.scales[first:last], scales, None, 0, skip)


def write(
    target: Tensor, values: Tensor, bits: Tensor | None, use: int, skip: Tensor | None
) -> None:
    """Copy in place, rounded by chance where the target is bf16, and `bits` are given."""
    if target.dtype == torch.bfloat16 and bits is not None:
        values = rounded(values, bits, use)
    target.copy_(values if skip is None else torch.where(skip, target, values.to(target.dtype)))


def as_rows(tensor: Tensor, piece: Piece) -> Tensor:
    """Return a (rows, columns) view of what lies as the piece."""
    width = piece.columns[1] - piece.columns[0]
    return tensor.view(tensor.numel() // width, width) if width else tensor.view(0, 0)
