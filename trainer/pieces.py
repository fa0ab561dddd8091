"""The piece of a tensor that this rank holds, and where it lies in the whole."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements [start, stop) of a flattened tensor of `shape`; `local` aliases the parameter."""

    local: Tensor
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == math.prod(self.shape)
