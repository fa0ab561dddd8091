"""Shards of documents that say what is to be learnt: a target per token, or one per document."""

from bisect import bisect_right
from functools import cached_property

import numpy as np

from models.nn.head import IGNORED
from trainer.data.examples import PREFERENCE, Example, Labels
from trainer.data.shards import STARTS
from trainer.data.tokens import TokenStore

# Sections of a shard: the target of each token, or the class or numbers of each document.
LABELS, CLASSES = "labels", "classes"


def sections(example: Example) -> dict[str, np.ndarray]:
    """Return what a document adds to the sections of its shard."""
    if example.labels is not None:
        return {LABELS: example.labels.astype("<i4")}
    assert example.classes is not None
    is_number = example.classes.dtype.kind == "f"
    return {CLASSES: example.classes.reshape(-1).astype("<f8" if is_number else "<i4")}


def no_targets(labels: Labels | None) -> dict[str, np.ndarray]:
    """Return what stands for a document that is none: no token, no class."""
    if labels is None or labels.problem_type is None:
        return {LABELS: np.empty(0, "<i4")}
    if labels.problem_type in ("single_label_classification", PREFERENCE):
        return {CLASSES: np.full(1 + (labels.problem_type == PREFERENCE), IGNORED, "<i4")}
    return {CLASSES: np.full(len(labels.names), np.nan, "<f8")}


class DocumentStore(TokenStore):
    """A store whose shards say what is to be learnt of each token."""

    def length(self, document: int) -> int:
        """Return how many tokens a document has; 0: a bad row stood there."""
        _, start, stop = self._place(document)
        return stop - start

    def all_lengths(self) -> np.ndarray:
        """Return the length of every document, in order."""
        shards = map(self.shard, range(len(self.entries)))
        starts = [shard.read(STARTS, 0, shard.footer.num_documents + 1) for shard in shards]
        return np.concatenate([np.diff(one) for one in starts])

    def num_targets(self, num_classes: int) -> np.ndarray:
        """Return how many targets of each class each part has: (parts, classes)."""
        found = np.zeros((len(self.parts), num_classes), np.int64)
        for number in range(len(self.entries)):
            sections = self.shard(number).footer.sections
            name = LABELS if LABELS in sections else CLASSES
            classes = self.shard(number).read(name, 0, sections[name].count)
            part = bisect_right(self.first_shards, number) - 1
            found[part] += np.bincount(classes[classes != IGNORED], minlength=num_classes)
        return found

    def example(self, document: int) -> Example:
        number, start, stop = self._place(document)
        shard = self.shard(number)
        ids = shard.tokens(start, stop).astype(np.int64)
        if LABELS in shard.footer.sections:
            return Example(input_ids=ids, labels=shard.read(LABELS, start, stop).astype(np.int64))
        assert self.no_class is not None
        width = self.no_class.size
        first = (document - self.first_documents[number]) * width
        classes = shard.read(CLASSES, first, first + width)
        return Example(
            input_ids=ids, classes=classes.astype(self.no_class.dtype).reshape(self.no_class.shape)
        )

    @cached_property
    def no_class(self) -> np.ndarray | None:
        """The class of a document that has none: () int64, (num_labels,) or, of a pair, (2,) int64;
        None: targets are per token."""
        footer = self.shard(0).footer
        section = footer.sections.get(CLASSES)
        if section is None:
            return None
        width = section.count // footer.num_documents
        if np.dtype(section.dtype).kind == "i":
            return np.full((width,) if width > 1 else (), IGNORED, np.int64)
        return np.full(width, np.nan)

    @property
    def has_pairs(self) -> bool:
        """Whether a document is two texts."""
        return (
            self.no_class is not None and self.no_class.dtype.kind == "i" and self.no_class.ndim > 0
        )

    def _place(self, document: int) -> tuple[int, int, int]:
        """Return the shard of a document and its tokens [start, stop) there."""
        number = bisect_right(self.first_documents, document) - 1
        local = document - self.first_documents[number]
        start, stop = self.shard(number).read(STARTS, local, local + 2).tolist()
        return number, start, stop
