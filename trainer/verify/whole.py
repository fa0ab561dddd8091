"""Putting the pieces of all ranks together again, and comparing two sets of tensors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from trainer.distributed import Ranks
from trainer.pieces import Piece

Tensors = dict[str, np.ndarray]


def whole(pieces: dict[str, Piece], ranks: Ranks, complaints: list[str]) -> Tensors | None:
    """Return the whole tensors on rank 0, None elsewhere. Collective.

    Adds to `complaints` where copies differ by a single bit, or nobody holds some of a tensor.
    """
    own = {
        name: (
            piece.shape,
            [(rows.start, rows.stop) for rows in piece.rows],
            piece.columns,
            piece.local.detach().cpu().double().numpy(),
        )
        for name, piece in pieces.items()
    }
    gathered: list[Any] | None = (
        [None] * ranks.placement.world_size if ranks.placement.is_main else None
    )
    dist.gather_object(own, gathered, group=ranks.control_group)
    if gathered is None:
        return None
    result = {}
    for name, (shape, *_) in own.items():
        parts = [of_rank[name][1:] for of_rank in gathered if of_rank is not None]
        result[name], complaint = _assemble(shape, parts)
        if complaint:
            complaints.append(f"{name}: {complaint}")
    return result


def _assemble(shape: tuple[int, ...], parts: list[Any]) -> tuple[np.ndarray, str]:
    """Return the whole tensor, and what is wrong with it or nothing."""
    rows, width = (shape[0] if shape else 1), int(np.prod(shape[1:], dtype=int))
    matrix = np.full((rows, width), np.nan)
    complaint = ""
    for runs, (first, last), values in parts:
        values = values.reshape(-1, last - first)
        place = 0
        for start, stop in runs:
            target = matrix[start:stop, first:last]
            given = values[place : place + stop - start]
            is_there = ~np.isnan(target)
            if not np.array_equal(target[is_there], given[is_there]):
                gap = np.abs(target - given)[is_there].max()
                complaint = f"ranks hold copies that differ by {gap:.3g}"
            target[...] = given
            place += stop - start
    if np.isnan(matrix).any():
        complaint = "no rank holds some of it, or it is NaN"
    return matrix.reshape(shape), complaint


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far one quantity lies from the reference, and where it is worst."""

    quantity: str
    value: float
    """max |a - b| / max |b|, of the worst tensor."""
    name: str


def deviation(
    quantity: str, found: Tensors, expected: Tensors, floor_share: float = 0.0
) -> Deviation:
    """Return the worst deviation of `found`; names and shapes must be the same.

    A tensor is compared at no finer scale than `floor_share` of the largest one.
    """
    if found.keys() != expected.keys():
        different = sorted(found.keys() ^ expected.keys())
        return Deviation(quantity=quantity, value=float("inf"), name=f"only one has {different[0]}")
    floor = floor_share * max((_top(tensor) for tensor in expected.values()), default=0.0)
    worst = Deviation(quantity=quantity, value=-1.0, name="nothing")
    for name, tensor in expected.items():
        scale = max(_top(tensor), floor)
        gap = _top(found[name] - tensor)
        value = gap / scale if scale else gap
        if not value <= worst.value:
            worst = Deviation(quantity=quantity, value=value, name=name)
        if value != value:
            return worst  # NaN is worst of all: nothing that follows may replace it
    return worst


def _top(tensor: np.ndarray) -> float:
    return float(np.abs(tensor).max()) if tensor.size else 0.0
