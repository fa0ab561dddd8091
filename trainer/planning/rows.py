"""A step of full rows: the most that a run's batches can hold."""

from dataclasses import replace
from typing import Any

import torch

from trainer.batch import Batch
from trainer.run import Run
from trainer.run_images import family_of
from trainer.verify.made_labels import MadeLabels
from trainer.verify.rows import MadeRows

MICRO_BATCHES = 2  # of a longer step: the second one meets the gradients of the first


def micro_rows_of(run: Run, dp_size: int) -> int:
    """Return the rows of one forward pass of one rank."""
    data: Any = run.data
    if hasattr(data, "rows_per_micro_batch"):
        return int(data.rows_per_micro_batch(dp_size))
    return int(data.micro_rows)


def full_batches(run: Run, dp_size: int, *, is_pipeline: bool) -> list[Batch]:
    """Return micro-batches of rows without padding, of one document each, all images there."""
    rows = micro_rows_of(run, dp_size)
    count = run.data.micro_batches(dp_size) or MICRO_BATCHES
    if not is_pipeline:  # which keeps something of each
        count = min(count, MICRO_BATCHES)
    labels, tokens = run.data.labels, run.data.row_tokens
    made = MadeRows(
        vocab_size=run.model.vocab_size, rows=rows * count, micro_rows=rows, tokens=tokens,
        packed=labels is not None, relabel=MadeLabels(labels=labels) if labels else None,
        virtual_ids=run.virtual_ids,
    )  # fmt: skip
    return [replace(batch, sources=None, num_sources=0) for batch in made.micro_batches(1, 0, 1)]


def with_images(batch: Batch, run: Run) -> Batch:
    """Return the batch with as many images as its rows may have."""
    if run.data.image_size is None:
        return batch
    data: Any = run.data
    vision: Any = family_of(run.model)
    size, count = vision.vision_config.image_size, data.row_images
    rows, length = batch.input_ids.shape
    return replace(
        batch,
        pixel_values=torch.empty(rows, count, 3, size, size),
        image_attention_mask=torch.ones(rows, length, count, dtype=torch.int64),
    )
