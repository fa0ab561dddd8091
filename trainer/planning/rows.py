"""A step of full rows: the most that a run's batches can hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.batch import Batch
from trainer.data.document_data import DocumentData
from trainer.data.tokenizers import BPE
from trainer.run import Run
from trainer.run_data import documents_at_hand
from trainer.run_images import family_of, fitted
from trainer.run_tokenizer import tokenizer_of
from trainer.verify.made_labels import MadeLabels
from trainer.verify.rows import MadeRows

MICRO_BATCHES = 2  # of a longer step: the second one meets the gradients of the first
SAMPLED_STEPS = 16  # of documents that were made before


def micro_rows_of(run: Run, dp_size: int) -> int:
    """Return the rows of one forward pass of one rank."""
    data: Any = run.data
    if hasattr(data, "rows_per_micro_batch"):
        return int(data.rows_per_micro_batch(dp_size))
    return int(data.micro_rows)


def full_batches(run: Run, dp_size: int, *, is_pipeline: bool) -> list[Batch]:
    """Return micro-batches of rows without padding, of one document each, all images there."""
    rows = micro_rows_of(run, dp_size)
    count = most_micro_batches(run, dp_size)
    if not is_pipeline:  # which keeps something of each
        count = min(count, MICRO_BATCHES)
    labels, tokens = run.data.labels, run.data.row_tokens
    made = MadeRows(
        vocab_size=run.model.vocab_size, rows=rows * count, micro_rows=rows, tokens=tokens,
        packed=labels is not None, relabel=MadeLabels(labels=labels) if labels else None,
        virtual_ids=run.virtual_ids,
    )  # fmt: skip
    return [replace(batch, sources=None, num_sources=0) for batch in made.micro_batches(1, 0, 1)]


def most_micro_batches(run: Run, dp_size: int) -> int:
    """Return how many micro-batches the longest step of a rank has.

    Documents that were made before are counted, in steps of some of them; others have a row each.
    """
    data = fitted(run.data, run.model)
    if not isinstance(data, DocumentData):
        return data.micro_batches(dp_size) or MICRO_BATCHES
    documents = data.global_documents
    rows = _most_rows(run, data) or documents
    return -(-min(rows, documents) // (dp_size * data.micro_rows))


def _most_rows(run: Run, data: DocumentData) -> int | None:
    """Return the rows of the longest of some steps; None: nothing was made yet."""
    paths = [data.path] if data.path else [place.path for place in (data.sources or {}).values()]
    is_trained = run.tokenizer_setting == data.own_tokenizer == BPE  # for which all would be read
    if is_trained or not paths or not all(map(_exists, paths)):
        return None
    tokenizer = tokenizer_of(data, run.tokenizer_setting, run.model)
    store = documents_at_hand(data, tokenizer)
    if store is None:
        return None
    packed, draw = data.packed(store, tokenizer, run.virtual_ids), np.random.default_rng(run.seed)
    steps = draw.integers(store.num_documents, size=(SAMPLED_STEPS, data.global_documents))
    return max(int(packed.rows_of(step.tolist())[1].max()) + 1 for step in steps)


def _exists(path: str) -> bool:
    """Whether a place is on this machine: to know one of the Hub, it would be asked."""
    return Path(path).expanduser().exists()


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
