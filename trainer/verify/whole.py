"""Putting the pieces of all ranks together again, and comparing two sets of tensors."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.distributed import Ranks
from trainer.pieces import Piece

Tensors = dict[str, np.ndarray]


def whole(pieces: dict[str, Piece], ranks: Ranks, complaints: list[str]) -> Tensors | None:
    """Return the whole tensors on rank 0, None elsewhere. Collective.

    Adds to `complaints` where copies differ by a single bit, or nobody holds some of a tensor.
    """
    places = {
        name: ([(rows.start, rows.stop) for rows in piece.rows], piece.columns)
        for name, piece in pieces.items()
    }
    values = [piece.local.detach().cpu().double().numpy().reshape(-1) for piece in pieces.values()]
    gathered_places = _gathered(json.dumps(places).encode(), ranks)
    gathered = _gathered(np.concatenate([np.empty(0), *values]).tobytes(), ranks)
    if not ranks.placement.is_main:
        return None
    of_ranks = [
        _parts(json.loads(text), np.frombuffer(data))
        for text, data in zip(gathered_places, gathered, strict=True)
    ]
    result = {}
    for name, piece in pieces.items():
        result[name], complaint = _assemble(piece.shape, [parts[name] for parts in of_ranks])
        if complaint:
            complaints.append(f"{name}: {complaint}")
    return result


def _gathered(data: bytes, ranks: Ranks) -> list[bytes]:
    """Return the bytes of every rank on rank 0, nothing elsewhere: no pickle. Collective."""
    (longest,) = ranks.maximum([len(data)])
    own = torch.zeros(8 + longest, dtype=torch.uint8)
    own[: 8 + len(data)] = torch.frombuffer(
        bytearray(len(data).to_bytes(8, "little") + data), dtype=torch.uint8
    )
    is_main, count = ranks.placement.is_main, ranks.placement.world_size
    found = [torch.empty_like(own) for _ in range(count)] if is_main else None
    dist.gather(own, found, group=ranks.control_group)
    return [_unpadded(each.numpy().tobytes()) for each in found or ()]


def _unpadded(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _parts(places: dict[str, Any], values: np.ndarray) -> dict[str, Any]:
    """Return what a rank holds of each tensor: runs of rows, columns and values."""
    parts, first = {}, 0
    for name, (runs, (left, right)) in places.items():
        last = first + sum(stop - start for start, stop in runs) * (right - left)
        parts[name] = runs, (left, right), values[first:last]
        first = last
    return parts


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
