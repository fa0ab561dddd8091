"""Concat-and-split: cut one long token stream into rows that know their document borders."""

import numpy as np
import torch

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.data.tokens import TokenStore


class PackedRows:
    """The rows of a token store: row i is tokens [i*T, (i+1)*T) of the stream; the last is padded.

    A document cut by a row border goes on in the next row as a segment of its own. Every token that
    has a predecessor in its document is a target exactly once.
    """

    def __init__(self, store: TokenStore, row_tokens: int) -> None:
        self.store, self.row_tokens = store, row_tokens
        self.num_rows = -(-store.num_tokens // row_tokens)

    def batch(self, rows: list[int], num_rows: int) -> Batch:
        """Return `rows` as one Batch of `num_rows` rows; missing ones are padding."""
        length = self.row_tokens
        columns = {
            "input_ids": np.zeros((num_rows, length), np.int64),
            "labels": np.full((num_rows, length), IGNORED, np.int64),
            "position_ids": np.zeros((num_rows, length), np.int64),
            "segment_ids": np.zeros((num_rows, length), np.int64),
        }
        provenance = []
        for place, row in enumerate(rows):
            values, documents = self._row(row)
            for name, value in values.items():
                columns[name][place, : len(value)] = value
            provenance.append(f"{self.store.name}[{documents[0]}:{documents[-1] + 1}]")
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return Batch(**tensors, provenance=tuple(provenance))

    def _row(self, row: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        start = row * self.row_tokens
        stop = min(start + self.row_tokens, self.store.num_tokens)
        places = np.arange(start, stop)
        starts = self.store.document_starts
        documents = np.searchsorted(starts, places, side="right") - 1
        tokens = self.store.read(start, min(stop + 1, self.store.num_tokens))
        targets = np.full(stop - start, IGNORED, np.int64)
        targets[: len(tokens) - 1] = tokens[1:]
        # Nothing predicts across a border: the last token of a document has no target.
        is_last = np.isin(places + 1, starts[documents[0] : documents[-1] + 2])
        targets[is_last] = IGNORED
        values = {
            "input_ids": tokens[: stop - start],
            "labels": targets,
            "position_ids": places - np.maximum(starts[documents], start),
            "segment_ids": documents - documents[0] + 1,
        }
        return values, documents
