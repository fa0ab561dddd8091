"""The contract between data and model: one micro-batch of one rank, in fixed shapes."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.nn.head import IGNORED


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. Tensors are (B, T) int64 but for classes and images.

    Attention never crosses segments."""

    input_ids: Tensor
    labels: Tensor
    """The target of each position, already shifted; -100 is ignored."""
    position_ids: Tensor
    """Restart at 0 in every segment."""
    segment_ids: Tensor
    """0 is padding; 1, 2, .. number the documents of the row."""
    class_labels: Tensor | None = None
    """Targets of a sequence head, (B, segments[, labels]); -100 or NaN: none. Replace `labels`."""
    pixel_values: Tensor | None = None
    """(B, I, C, height, width) images of each row, padded to the same number I."""
    image_attention_mask: Tensor | None = None
    """(B, T, I), 1 where a position may look at an image."""
    image_keys: Tensor | None = None
    """(B, I, 2), on the host: hashes of the pixels of each image."""
    sources: Tensor | None = None
    """Which of `num_sources` each target is of, in the first two dimensions of the targets; None:
    all are of one source."""
    num_sources: int = 0
    blank_image: bool = False
    """Without images: whether what looks at images runs all the same, on a blank one that no
    position sees, since it runs on other ranks at the same time."""
    provenance: tuple[str, ...]
    """For each row where it came from: `source[first:last]` in units of that source's documents."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def targets(self) -> Tensor:
        """What the head compares with."""
        return self.labels if self.class_labels is None else self.class_labels

    @property
    def text(self) -> tuple[Tensor, Tensor, Tensor]:
        """What every model takes: ids, positions and segments."""
        return self.input_ids, self.position_ids, self.segment_ids

    @property
    def images(self) -> dict[str, Any]:
        """What the trunk takes beside text; a mask alone is about images that a cache holds."""
        found = {name: getattr(self, name) for name in ("pixel_values", "image_attention_mask")}
        images = {name: tensor for name, tensor in found.items() if tensor is not None}
        return images | ({"blank_image": True} if self.blank_image else {})

    @property
    def known_images(self) -> dict[str, Any]:
        """The same for a trunk that may remember images."""
        keys = {} if self.image_keys is None else {"image_keys": self.image_keys}
        return self.images | keys

    def num_targets(self) -> Tensor:
        """Return how many targets there are (0-dim, int64)."""
        return self._is_target().sum()

    def _is_target(self) -> Tensor:
        targets = self.targets
        return ~targets.isnan() if targets.is_floating_point() else targets != IGNORED

    def counts(self) -> Tensor:
        """Return (3 + num_sources,) int64: its targets, its `looks`, and each source's targets."""
        is_target = self._is_target()
        of_sources = [] if self.sources is None else [self.by_source(is_target).long()]
        return torch.cat([is_target.sum().view(1), self.looks(), *of_sources])

    def by_source(self, values: Tensor) -> Tensor:
        """Return (num_sources,) fp64: the sum of `values` over the targets of each source.

        They have the shape of the targets. (0,) where all are of one source.
        """
        if self.sources is None:
            return torch.zeros(0, dtype=torch.float64, device=values.device)
        each = values.reshape(*self.sources.shape, -1).sum(-1, dtype=torch.float64)
        # where, not scatter_add: atomic additions on a GPU have no order. And NaN stays at home.
        sums = [torch.where(self.sources == n, each, 0.0).sum() for n in range(self.num_sources)]
        return torch.stack(sums)

    def looks(self) -> Tensor:
        """Return how many tokens look at an image, and how many images are looked at (2, int64).

        Blank ones, which fill rows up, are not: each other one is seen by its own token at least.
        """
        mask = self.image_attention_mask
        if mask is None:
            return torch.zeros(2, dtype=torch.int64, device=self.input_ids.device)
        return torch.stack([(mask != 0).any(dim).sum() for dim in (-1, -2)])

    def padded(self, count: int) -> "Batch":
        """Return the batch with `count` padding tokens behind every row."""
        if not count:
            return self
        mask, sources = self.image_attention_mask, self.sources
        if sources is not None and self.class_labels is None:
            sources = F.pad(sources, (0, count))
        return replace(
            self,
            sources=sources,
            input_ids=F.pad(self.input_ids, (0, count)),
            labels=F.pad(self.labels, (0, count), value=IGNORED),
            position_ids=F.pad(self.position_ids, (0, count)),
            segment_ids=F.pad(self.segment_ids, (0, count)),
            image_attention_mask=None if mask is None else F.pad(mask, (0, 0, 0, count)),
        )

    def blank(self) -> "Batch":
        """Return padding alone in the same shapes: it holds no target and changes no sum."""
        nothing = torch.zeros_like(self.input_ids)
        classes = self.class_labels
        if classes is not None:
            none = torch.nan if classes.is_floating_point() else IGNORED
            classes = torch.full_like(classes, none)
        mask = self.image_attention_mask
        return replace(
            self,
            input_ids=nothing,
            labels=torch.full_like(self.labels, IGNORED),
            position_ids=nothing,
            segment_ids=nothing,
            class_labels=classes,
            image_attention_mask=None if mask is None else torch.zeros_like(mask),
            provenance=(),
        )

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors that are not there to `device`, without waiting for the copy."""
        if device.type == "cpu":
            return self
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            # Pinned: a copy from pageable memory makes the host wait.
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and name != "image_keys"
        }
        return replace(self, **moved)
