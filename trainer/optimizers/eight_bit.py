"""Numbers in 8 bits: a table of 256 values, scaled by the largest of each block.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). A
block is up to 256 elements of one row, and never reaches into the next: no cut between rows cuts
one, so every layout has the same blocks, and reads what another one wrote.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layout import Layout
from trainer.parallel.data_parallel import named_blocks
from trainer.pieces import Piece, is_vector

BLOCK = 256
SMALLEST = 4096  # elements of a tensor that is worth it: norms and biases keep all their bits
_EXPONENTS = 7


def is_coded(shape: tuple[int, ...]) -> bool:
    """Whether state of a whole weight of this shape is kept in 8 bits."""
    count = torch.Size(shape).numel()
    return not is_vector(shape) and count >= SMALLEST and count // shape[0] > 1


def num_blocks(columns: int) -> int:
    """Return in how many blocks so many elements of a row lie."""
    return -(-columns // BLOCK)


@cache
def table(device: torch.device, *, is_signed: bool) -> Tensor:
    """Return the 256 values in ascending order, fp32: dense near zero, relatively even.

    Between two powers of ten stand the middles of equal parts, twice as many as between the two
    below. Unsigned ones leave out zero: a mean of squares that is rounded to zero makes the next
    update too large by any factor (Li et al. 2023, arXiv 2309.01507).
    """
    values = [1.0] if is_signed else [1.0, 10.0**-_EXPONENTS]
    for exponent in range(_EXPONENTS):
        count = 2 ** (exponent + (not is_signed))
        # Of Python's numbers: where a plan is made, tensors have no values, and this stays.
        half = 0.45 / count
        middles = [
            (0.1 + (2 * n + 1) * half) * 10.0 ** (exponent - _EXPONENTS + 1) for n in range(count)
        ]
        values += middles + [-value for value in middles if is_signed]
    if is_signed:
        values.append(0.0)
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _borders(device: torch.device, *, is_signed: bool) -> Tensor:
    """Return the middles between neighbours, and one that nothing lies beyond."""
    values = table(device, is_signed=is_signed)
    middles = (values[1:] + values[:-1]) / 2
    return torch.cat([middles, middles.new_full((1,), torch.inf)])


@cache
def _lowest(device: torch.device, *, is_signed: bool) -> Tensor:
    """Return, for each of the 2^16 upper halves of an fp32, the code of the lowest such number.

    One step up makes it the code of any of them: so narrow is each, that at most one border cuts it
    (the test compares with a search). A search of each number took five times as long on a CPU.
    """
    halves = torch.arange(1 << 16, device=device, dtype=torch.int32)
    one = (halves << 16).view(torch.float32)
    other = ((halves << 16) | 0xFFFF).view(torch.float32)
    lowest = torch.minimum(one, other).nan_to_num(0.0)
    return torch.bucketize(lowest, _borders(device, is_signed=is_signed)).to(torch.uint8)


def encode(values: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes of (rows, columns) values, and the (rows, blocks) fp32 scales."""
    rows, columns = values.shape
    count = num_blocks(columns)
    padded = F.pad(values, (0, count * BLOCK - columns)).view(rows, count, BLOCK)
    scales = padded.abs().amax(dim=-1).float()
    # Of a block of zeros: any number; the scale makes them zeros again.
    parts = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).float()
    return _nearest(parts, is_signed=is_signed).view(rows, -1)[:, :columns], scales


def _nearest(parts: Tensor, *, is_signed: bool) -> Tensor:
    """Return the codes of the nearest values of the table to numbers from -1 to 1."""
    halves = (parts.view(torch.int32) >> 16) & 0xFFFF
    codes = _lowest(parts.device, is_signed=is_signed)[halves]
    borders = _borders(parts.device, is_signed=is_signed)
    return codes + (parts > borders[codes.int()])


def decode(codes: Tensor, scales: Tensor, *, is_signed: bool) -> Tensor:
    """Return fp32 (rows, columns) values."""
    values = table(codes.device, is_signed=is_signed)[codes.int()]
    return values * scales.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]


def scale_piece(piece: Piece, scales: Tensor) -> Piece:
    """Return where the scales of a weight's piece lie: among (rows, blocks) of the whole."""
    first, last = piece.columns
    return Piece(
        local=scales, shape=(piece.num_rows, num_blocks(piece.width)), rows=piece.rows,
        columns=(first // BLOCK, num_blocks(last)), column_group=piece.column_group,
    )  # fmt: skip


def check_blocks(model: nn.Module, layout: Layout, tp: int) -> None:
    """Raise ValueError where tensor parallelism would cut a block."""
    for prefix, block in named_blocks(model, layout) if tp > 1 else ():
        for path in layout.rowwise:
            name = f"{prefix}.{path}.weight"
            weight = dict(block.named_parameters()).get(f"{path}.weight")
            if weight is None or not weight.requires_grad or not is_coded(tuple(weight.shape)):
                continue
            if weight.shape[1] // tp % BLOCK:
                raise ValueError(
                    f"optim.states=8bit scales blocks of {BLOCK} columns, and mesh.tp={tp} cuts "
                    f"the {weight.shape[1]} of {name} into parts of {weight.shape[1] // tp}; set "
                    f"mesh.tp so that {BLOCK} divides them, or optim.states=bf16"
                )
