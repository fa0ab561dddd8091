"""Rows with images: documents packed within each step by tokens and images, in text's own order."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.added_tokens import extended
from trainer.data.batching import check_sizes
from trainer.data.document_data import DocumentData
from trainer.data.document_store import DocumentStore, image_sections
from trainer.data.documents import PackedDocuments
from trainer.data.examples import BadRowError, Example, Note, is_none
from trainer.data.images.batches import ImageBatches
from trainer.data.images.decode import MAX_PIXELS, PILLOWS_LIMIT
from trainer.data.images.files import ImageFiles
from trainer.data.images.processor import ImageProcessor
from trainer.data.images.references import ImageReference
from trainer.data.images.sources import ImageRows, open_image_rows
from trainer.data.images.tokens import TOKENS, ImageTokens, image_tokens
from trainer.data.named_sources import Source
from trainer.data.sources import RowSource
from trainer.data.tokenizers import Tokenizer
from trainer.data.tokens import EVAL
from trainer.data.vision_text import VisionTextEncoder


@dataclass(frozen=True, kw_only=True)
class VisionTextData(DocumentData):
    """Documents of rows with images. Shards keep where images are stored; pixels are read, and
    processed, when a batch is made."""

    encoder: VisionTextEncoder
    """Makes documents of rows, with what is to be learnt of each token."""
    processor: ImageProcessor = field(default_factory=ImageProcessor)
    """Makes pixels of images."""
    row_images: int
    """Images that a row has at most: so the most of a document."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded; a larger one makes a bad row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(row_images=self.row_images, max_pixels=self.max_pixels)
        if self.max_pixels > PILLOWS_LIMIT:
            raise ValueError(
                f"data.max_pixels={self.max_pixels} is more than Pillow decodes; "
                f"set it to {PILLOWS_LIMIT} or less"
            )

    @property
    def image_size(self) -> int | None:
        return self.processor.resolved.image_size

    def open_place(self, source: Source, key: str) -> ImageRows:
        return open_image_rows(source, key, self.max_documents)

    @property
    def limits(self) -> dict[str, Any]:
        length = self.row_tokens if self.too_long == "cut" else None
        return {"images": [self.row_images, self.max_pixels], "cut": length}

    def document(self, row: dict[str, Any], place: RowSource, tokenizer: Tokenizer) -> Example:
        """Return the document of a row; each of its images has been decoded once.

        BadRowError names the row's image that is missing, too large or broken.
        """
        example = super().document(row, place, tokenizer)
        assert example.images is not None
        if len(example.images) > self.row_images:
            raise BadRowError(
                f"the row has {len(example.images)} images, more than "
                f"data.row_images={self.row_images}; raise it, or drop the row"
            )
        if self.too_long == "cut":
            example = cut(example, self.row_tokens, image_tokens(tokenizer))
        assert example.images is not None
        files = self._files(place)
        sealed = [_sealed(files, *numbered) for numbered in enumerate(example.images, start=1)]
        return replace(example, images=tuple(sealed))

    def no_document(self) -> dict[str, np.ndarray]:
        return super().no_document() | image_sections(())

    def check_virtual(self, ids: Sequence[int]) -> None:
        if ids:  # an image block is cut, or not, when its document is made: without them
            raise ValueError("adapter=prompt is not for data=vision_text; set adapter=lora")

    @property
    def speller(self) -> Tokenizer:
        plain = super().speller
        return extended(plain, TOKENS, plain.vocab_size)

    def packed(
        self, store: DocumentStore, tokenizer: Tokenizer, virtual_ids: Sequence[int]
    ) -> PackedDocuments:
        places, evaluation = self.places, self.eval_place
        files = [
            self._files(evaluation if evaluation and part.name == EVAL else places[part.source])
            for part in store.parts
        ]
        images = ImageBatches(
            store, files, self.processor.resolved,
            row_images=self.row_images, image_token_id=image_tokens(tokenizer).image,
        )  # fmt: skip
        is_packed = self.packing == "best_fit"
        return PackedDocuments(store, self.row_tokens, is_packed=is_packed, images=images)

    def _files(self, place: RowSource) -> ImageFiles:
        """Return the images of a place, which remembers those that are whole."""
        assert isinstance(place, ImageRows)
        if place.root not in self._files_below:
            self._files_below[place.root] = ImageFiles(place.root, self.max_pixels)
        return self._files_below[place.root]

    @cached_property
    def _files_below(self) -> dict[Path, ImageFiles]:
        return {}


def cut(example: Example, length: int, tokens: ImageTokens) -> Example:
    """Return the beginning of a document with its images; BadRowError where that halves one."""
    ids, images = example.input_ids, example.images
    if len(ids) <= length:
        return example
    if np.isin(ids[length - 1 : length + 1], tokens).all():
        raise BadRowError(
            f"data.row_tokens={length} would cut the document, of {len(ids)} tokens, inside an "
            "image; raise it, or drop the row"
        )
    assert example.labels is not None
    assert images is not None
    labels = example.labels[:length]
    if is_none(labels).all():
        raise BadRowError(
            f"none of the {length} tokens that data.row_tokens keeps is trained; raise it"
        )
    kept = int((ids[:length] == tokens.image).sum())
    note = Note("documents cut to data.row_tokens", f"{len(ids)} tokens")
    return replace(
        example,
        input_ids=ids[:length], labels=labels, images=images[:kept], notes=(*example.notes, note),
    )  # fmt: skip


def _sealed(files: ImageFiles, number: int, reference: ImageReference) -> ImageReference:
    try:
        return files.sealed(reference)
    except BadRowError as error:
        raise BadRowError(f"image {number} of the row ({reference}) {error}") from None
