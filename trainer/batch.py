"""The contract between data and model: one micro-batch of one rank, in fixed shapes."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. Tensors are (B, T) int64; attention never crosses segments."""

    input_ids: Tensor
    labels: Tensor
    """The target of each position, already shifted; -100 is ignored."""
    position_ids: Tensor
    """Restart at 0 in every segment."""
    segment_ids: Tensor
    """0 is padding; 1, 2, .. number the documents of the row."""
    provenance: tuple[str, ...]
    """For each row where it came from: `source[first:last]` in units of that source's documents."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to `device`, without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved = {
            # Pinned: a copy from pageable memory makes the host wait.
            field.name: getattr(self, field.name).pin_memory().to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)
