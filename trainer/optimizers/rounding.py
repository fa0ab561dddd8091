"""Stochastic rounding to bf16, by numbers that depend on the element and not on the layout.

A bf16 number has 8 significant bits: what is added to it and is smaller than 2^-9 of it is lost by
rounding to the nearest, at every step. Rounded up with the probability of the part that is cut off,
it is kept on average. Source: Gupta et al. 2015 (arXiv 1502.02551); of weights: Zamirai et al. 2020
(arXiv 2010.06192).
"""

import torch
import xxhash
from torch import Tensor

from trainer.pieces import Piece

_ROWS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of splitmix64
_COLUMNS = (-1640531535, 2146121005, -2073254261)  # the golden ratio, and those of lowbias32
_USES = (1, 461845907, -862048943)  # odd ones, of murmur3
_CUT = 16  # bits of fp32 that bf16 has not


class Noise:
    """Random bits of each element of a piece: the same for an element wherever it lies.

    A hash of seed, name, step and the element's place in the whole tensor: a run that is resumed,
    or goes on with another number of ranks, rounds as it would have.
    """

    def __init__(self, piece: Piece, name: str, seed: int) -> None:
        self.start = xxhash.xxh3_64_intdigest(name.encode(), seed=seed) - (1 << 63)
        self.piece, self.width = piece, piece.width
        self._rows: Tensor | None = None

    def bits(self, step: Tensor, first: int, last: int) -> Tensor:
        """Return (rows, columns) int32 random bits for rows [first, last) of the piece."""
        # Numbers that the step decides come first: a plan of memory then holds none of them.
        rows = self._row_numbers(step.device)[first:last] + (step.long() * _ROWS[0] + self.start)
        rows = (rows ^ (rows >> 30)) * _ROWS[1]
        rows = (rows ^ (rows >> 27)) * _ROWS[2]
        columns = torch.arange(*self.piece.columns, dtype=torch.int32, device=step.device)
        x = (rows ^ (rows >> 31)).int()[:, None] + columns * _COLUMNS[0]
        x = (x ^ _shifted(x, 16)).mul_(_COLUMNS[1])
        x = (x ^ _shifted(x, 15)).mul_(_COLUMNS[2])
        return x.bitwise_xor_(_shifted(x, 16))

    def _row_numbers(self, device: torch.device) -> Tensor:
        if self._rows is None:
            runs = [torch.arange(r.start, r.stop, device=device) for r in self.piece.rows]
            self._rows = torch.cat(runs)
        return self._rows


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift int32 to the right, zeros first: `>>` alone repeats the sign, and its bit is lost."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def rounded(values: Tensor, bits: Tensor, use: int) -> Tensor:
    """Return fp32 or fp64 `values` as bf16, rounded up or down by chance.

    `use`: which numbers of an element's bits decide, 0 to 2.
    """
    chance = (bits * _USES[use]).bitwise_right_shift_(_CUT).bitwise_and_(0xFFFF)
    cut = chance.add_(values.float().view(torch.int32)).bitwise_and_(-(1 << _CUT))
    return cut.view(torch.float32).bfloat16()
