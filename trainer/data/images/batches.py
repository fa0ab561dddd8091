"""Images for packed rows: which rows documents share, their pixels, and who looks at which."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from trainer.batch import Batch
from trainer.data.document_store import DocumentStore
from trainer.data.examples import BadRowError
from trainer.data.images.files import ImageFiles
from trainer.data.images.mask import latest_image
from trainer.data.images.packing import best_fit_images, most_images_first
from trainer.data.images.processor import ImageProcessor
from trainer.data.images.references import ImageReference
from trainer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageBatches:
    """Reads and processes the images of a store's documents when a batch is made."""

    def __init__(
        self,
        store: DocumentStore,
        files: list[ImageFiles],
        processor: ImageProcessor,
        *,
        row_images: int,
        image_token_id: int,
    ) -> None:
        """`files`: those of each part of the store; `processor`: resolved."""
        self.store, self.files, self.processor = store, files, processor
        self.row_images, self.image_token_id = row_images, image_token_id
        self.eos_token_id = store.shard(0).footer.vocabulary.eos_token_id

    def rows_of(
        self, documents: tuple[int, ...], lengths: np.ndarray, row_tokens: int | None
    ) -> np.ndarray:
        """Return the row of each document, rows with most images first; None: a row for each."""
        counts = np.array([self.store.num_images(document) for document in documents], np.int64)
        row_of = np.arange(len(documents))
        if row_tokens is not None:
            row_of = best_fit_images(lengths, counts, row_tokens, self.row_images)
        return most_images_first(row_of, counts)

    def added(self, batch: Batch, rows: list[list[int]], together: list[int]) -> Batch:
        """Return a micro-batch with the images of its rows' documents.

        `together` are the documents of all ranks at the same time. Where one of them has images and
        these rows have none, a blank one is run: all ranks run the same modules, or wait for ever.
        Every rank reads this off the list of documents, which is the same on all of them: so they
        agree without a message, before the step begins.
        """
        images = [self._images(documents) for documents in rows]
        most = max(map(len, images), default=0)
        if not most:
            return replace(batch, blank_image=any(map(self.store.num_images, together)))
        side = self.processor.image_size
        assert side is not None
        pixels = np.zeros((batch.num_rows, most, 3, side, side), np.float32)
        for row, references in enumerate(images):
            for number, (document, reference) in enumerate(references):
                pixels[row, number] = self._pixels(document, reference)
        return replace(
            batch,
            pixel_values=torch.from_numpy(pixels),
            image_keys=torch.from_numpy(_keys(pixels)),
            image_attention_mask=torch.from_numpy(self._mask(batch, most)),
        )

    def _images(self, documents: list[int]) -> list[tuple[int, ImageReference]]:
        """Return the images of a row in order, each with its document."""
        return [
            (document, reference)
            for document in documents
            for reference in self.store.example(document).images or ()
        ]

    def pictures(self, document: int, ids: list[int]) -> "list[Image]":
        """Return the images whose places are among the first tokens `ids` of a document."""
        references = self.store.example(document).images or ()
        wanted = references[: ids.count(self.image_token_id)]
        return [self._picture(document, reference) for reference in wanted]

    def _pixels(self, document: int, reference: ImageReference) -> np.ndarray:
        return self.processor(self._picture(document, reference))

    def _picture(self, document: int, reference: ImageReference) -> "Image":
        part, _ = self.store.part_of(document)
        files = self.files[part]
        try:
            return files.read(reference)
        except BadRowError as error:
            # No bad row any more: the other ranks have dealt the step with this document in it.
            raise DataError(
                f"image {files.root}/{reference} of {self.store.cite(document, document + 1)} "
                f"{error}; it was whole when documents were made: bring it back, or delete "
                f"{self.store.parts[part].folder} to make them anew"
            ) from error

    def _mask(self, batch: Batch, most: int) -> np.ndarray:
        """Return (B, T, images) int64, 1 where a token may look at an image."""
        ids, segments = batch.input_ids.numpy(), batch.segment_ids.numpy()
        latest = [
            latest_image(*row, self.image_token_id, self.eos_token_id)
            for row in zip(ids, segments, strict=True)
        ]
        return (np.stack(latest)[:, :, None] == np.arange(most)).astype(np.int64)


def _keys(pixels: np.ndarray) -> np.ndarray:
    """Return (B, images, 2) int64, the xxh3_128 of the pixels of each image."""
    rows, images = pixels.shape[:2]
    each = (xxhash.xxh3_128_digest(image.data) for image in pixels.reshape(rows * images, -1))
    return np.frombuffer(b"".join(each), np.int64).reshape(rows, images, 2).copy()
