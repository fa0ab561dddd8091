"""Made-up batches that are harder than real ones: uneven documents, targets and padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.nn.head import IGNORED
from trainer.batch import Batch

Relabel = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
"""Returns the labels that a head wants for made rows: `labels` or `class_labels` of a Batch."""
NUM_SOURCES = 3  # of which the last one has no document


@dataclass(frozen=True, kw_only=True)
class MadeRows:
    """Steps of `rows` rows; a pure function of the step, cut as StepLoader cuts real ones."""

    vocab_size: int
    rows: int = 8
    tokens: int = 32
    micro_rows: int = 2
    packed: bool = True
    """Several documents in a row, and padding behind the last one."""
    relabel: Relabel | None = None
    virtual_ids: Sequence[int] = ()
    """What every document begins with."""
    images: tuple[int, int, int] | None = None
    """Images of a row that has some, channels, and height = width; None: text alone."""

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[Batch]:
        """Return what data rank `rank` of `num_ranks` trains on in step number `step`."""
        made, first, stride = self._made(step), rank * self.micro_rows, num_ranks * self.micro_rows
        return [
            self._cut(made, start, slice(start - first, start - first + stride))
            for start in range(first, self.rows, stride)
        ]

    def _cut(self, made: dict[str, Tensor], start: int, together: slice) -> Batch:
        """Return the micro-batch of rows from `start`; all ranks' are rows `together`."""
        stop = start + self.micro_rows
        own: dict[str, Any] = {name: x[start:stop] for name, x in made.items()}
        batch = Batch(**own, num_sources=NUM_SOURCES, provenance=(f"made[{start}:{stop}]",))
        mask = batch.image_attention_mask
        if mask is None or mask.any():
            return batch
        is_beside = bool(made["image_attention_mask"][together].any())
        return replace(batch, pixel_values=None, image_attention_mask=None, blank_image=is_beside)

    def num_tokens(self, batches: list[Batch]) -> int:
        return sum(int((batch.segment_ids > 0).sum()) for batch in batches)

    def _made(self, step: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(step)
        rows = [self._row(number, random) for number in range(self.rows)]
        made = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if self.relabel is not None:
            made |= self.relabel(made, random)
        made["sources"] = self._sources(made)
        if self.images is not None:
            count, channels, size = self.images
            shape = (self.rows, count, channels, size, size)
            made["pixel_values"] = torch.randn(shape, generator=random, dtype=torch.float64)
            mask = torch.randint(0, 2, (self.rows, self.tokens, count), generator=random)
            sees = [row in self.rows_with_images(step) for row in range(self.rows)]
            made["image_attention_mask"] = mask * torch.tensor(sees)[:, None, None]
        return made

    def _sources(self, made: dict[str, Tensor]) -> Tensor:
        """Say that documents are of two sources in turn; the third has none."""
        segments = made["segment_ids"]
        if "class_labels" in made:
            segments = torch.arange(1, 1 + made["class_labels"].shape[1])[None]
        return (segments + torch.arange(self.rows)[:, None]) % 2

    def rows_with_images(self, step: int) -> tuple[int, ...]:
        """Return rows of which two, and four, ranks have some and some not; none in each third
        step."""
        return (0, self.rows * 3 // 4) if step % 3 else ()

    def _row(self, number: int, random: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(0, self.vocab_size, (self.tokens + 1,), generator=random)
        segments = self._segments(random)
        positions = torch.arange(self.tokens)
        for segment in segments.unique():
            is_in = segments == segment
            positions[is_in] -= int(positions[is_in][0])
        labels = ids[1:].clone()
        is_last = torch.ones(self.tokens, dtype=torch.bool)
        is_last[:-1] = segments[1:] != segments[:-1]
        is_dropped = torch.rand(self.tokens, generator=random) < number / self.rows / 2
        labels[(segments == 0) | is_last | is_dropped] = IGNORED
        if number == self.rows // 2:
            labels[:] = IGNORED  # a rank may meet rows without any target
        inputs, count = ids[:-1], len(self.virtual_ids)
        if count:
            virtual = torch.tensor(self.virtual_ids)[positions.clamp(max=count - 1)]
            inputs = torch.where(positions < count, virtual, inputs)
            labels[positions + 1 < count] = IGNORED  # a virtual token follows
        return {
            "input_ids": torch.where(segments > 0, inputs, 0),
            "labels": labels,
            "position_ids": positions,
            "segment_ids": segments,
        }

    def _segments(self, random: torch.Generator) -> Tensor:
        if not self.packed:
            return torch.ones(self.tokens, dtype=torch.int64)
        starts = torch.randperm(self.tokens - 1, generator=random)[:3] + 1
        is_start = torch.zeros(self.tokens, dtype=torch.int64)
        is_start[starts] = 1
        segments = is_start.cumsum(0) + 1
        return torch.where(segments == 4, 0, segments)  # what follows the last start is padding
