"""The images of a row as the model gets them: where they are stored, and who looks at which."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.batch import Batch
from trainer.data.document_store import DocumentStore
from trainer.data.images.tokens import IMAGE
from trainer.data.spelling import Speller
from trainer.data.tokens import TokenStore
from trainer.inspection.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class SeenImage:
    """One image of a row."""

    number: int
    """In the row, from 1."""
    file: str
    """Where it is stored, below the path of its source; empty where that is not known."""
    pixels: Tensor
    """(C, height, width): what the model gets of it, normalised."""


def images_of(
    batch: Batch, row: int, pieces: list[Piece], store: TokenStore | None
) -> list[SeenImage]:
    """Return the images that a row's tokens look at: not the blank ones that fill a batch up."""
    if batch.pixel_values is None or batch.image_attention_mask is None:
        return []
    count = int((batch.image_attention_mask[row] != 0).any(0).sum())
    files = [file for piece in pieces for file in _files(piece, store)]
    if len(files) != count:
        files = [""] * count
    return [
        SeenImage(number=n, file=file, pixels=batch.pixel_values[row, n - 1])
        for n, file in enumerate(files, start=1)
    ]


def _files(piece: Piece, store: TokenStore | None) -> list[str]:
    document = store.document(piece.provenance) if isinstance(store, DocumentStore) else None
    if document is None:
        return []
    assert isinstance(store, DocumentStore)
    return [str(reference) for reference in store.example(document).images or ()]


def looks_of(batch: Batch, row: int, run: slice) -> list[tuple[int, ...]]:
    """Return the numbers, from 1, of the images that each token of a run of a row looks at."""
    mask = batch.image_attention_mask
    if mask is None:
        return [()] * (run.stop - run.start)
    return [tuple((np.flatnonzero(one) + 1).tolist()) for one in mask[row, run].numpy()]


def num_astray(batch: Batch, tokenizer: Speller) -> int:
    """Count the tokens that look at an image of another document, or at one behind them."""
    if batch.image_attention_mask is None:
        return 0
    token = next(n for n, text in tokenizer.special_ids.items() if text == IMAGE)
    found = 0
    for ids, segments, mask in zip(
        batch.input_ids.numpy(), batch.segment_ids.numpy(), batch.image_attention_mask.numpy(),
        strict=True,
    ):  # fmt: skip
        places = np.flatnonzero((ids == token) & (segments > 0))
        looks = mask[:, : len(places)] != 0
        is_own = segments[:, None] == segments[places]
        is_behind = np.arange(len(ids))[:, None] < places
        is_blank = (mask[:, len(places) :] != 0).any(1)
        found += int(((looks & (~is_own | is_behind)).any(1) | is_blank).sum())
    return found
