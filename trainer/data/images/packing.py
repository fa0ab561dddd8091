"""Packing with two budgets: tokens and images of a row; and rows in an order fair to all ranks."""

import numpy as np


def best_fit_images(
    lengths: np.ndarray, counts: np.ndarray, row_tokens: int, row_images: int
) -> np.ndarray:
    """Return the row of each document: best fit, those first that fill most of either budget.

    `lengths` are 1 to `row_tokens` tokens, `counts` 0 to `row_images` images. Of the rows with
    space for both a document goes to that with the least space for tokens, then for images. Rows
    are numbered as they are opened. Source: Johnson 1974 (best fit decreasing); in two dimensions
    it bounds nothing, but leaves no two rows that could be one.
    """
    if not ((lengths > 0) & (lengths <= row_tokens) & (counts >= 0) & (counts <= row_images)).all():
        raise ValueError(
            f"documents of {lengths.min()} to {lengths.max()} tokens and up to {counts.max()} "
            f"images do not fit rows of {row_tokens} tokens and {row_images} images"
        )
    rows = np.empty(len(lengths), np.int64)
    tokens = np.empty(len(lengths), np.int64)  # space left in each open row
    images = np.empty(len(lengths), np.int64)
    shares = np.maximum(lengths * max(1, row_images), counts * row_tokens)  # of the fuller budget
    num_open = 0
    for document in np.argsort(-shares, kind="stable").tolist():
        length, count = int(lengths[document]), int(counts[document])
        fits = np.flatnonzero((tokens[:num_open] >= length) & (images[:num_open] >= count))
        if len(fits):
            space = tokens[fits] * (row_images + 1) + images[fits]
            row = int(fits[space.argmin()])
        else:
            row, num_open = num_open, num_open + 1
            tokens[row], images[row] = row_tokens, row_images
        tokens[row] -= length
        images[row] -= count
        rows[document] = row
    return rows


def most_images_first(row_of: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number rows anew, those with most images first; `counts` are the images of each document.

    Micro-batches are runs of rows, and those that ranks work on together are runs of micro-batches:
    in this order they differ little in images. Over the step any two ranks differ by at most the
    images of one micro-batch, on any number of ranks, which the order does not depend on.
    """
    of_rows = np.bincount(row_of, weights=counts).astype(np.int64)
    number = np.empty_like(of_rows)
    number[np.argsort(-of_rows, kind="stable")] = np.arange(len(of_rows))
    return number[row_of]
