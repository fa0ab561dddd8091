"""What `tessera inspect` says of a step, whatever it is shown in: facts, tables, numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launch.visible_text import visible
from trainer.data.examples import PREFERENCE
from trainer.data.loader import StepLoader
from trainer.data.tokenizers import Tokenizer
from trainer.inspection.counts import Counts
from trainer.inspection.words import SeenRow, SeenToken
from trainer.run import Run

MAX_CLASSES, MAX_LONGEST, MAX_ROWS, BAR_WIDTH = 10, 5, 10, 20


class Table(NamedTuple):
    """A small table; all columns but the last are numbers."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """One step of a run."""

    run: Run
    step: int
    tokenizer: Tokenizer
    loader: StepLoader
    num_held_out: int
    counts: Counts
    rows: list[SeenRow]

    @property
    def title(self) -> str:
        return f"{self.run.name}, step {self.step}"

    @property
    def is_of_texts(self) -> bool:
        """Whether whole documents are answered, and no token of them is trained."""
        labels = self.run.data.labels
        return labels is not None and labels.problem_type is not None

    @property
    def _has_pairs(self) -> bool:
        labels = self.run.data.labels
        return labels is not None and labels.problem_type == PREFERENCE

    def legend(self, mark: str) -> str:
        """Return what a mark in the text means."""
        labels = self.run.data.labels
        if labels is None:
            return f"{mark}: trained, the model learns to write it; the rest is only read"
        if self._has_pairs:
            return "of two texts of one place, the model learns which one is preferred"
        if labels.problem_type is None:
            return "a class stands behind the token that is to answer it; the rest is only read"
        return "the class of a document stands beside its place; its tokens are only read"

    def facts(self) -> dict[str, str]:
        """Return lines of text by name."""
        counts, store = self.counts, self.loader.rows.store
        paths = (f"{n} {s.path}".lstrip() for n, s in self.run.data.named_sources.items())
        micro_batches = _number(counts.num_micro_batches, "micro-batch", "micro-batches")
        found = {
            "data": f"{', '.join(paths)}: {store.num_tokens:,} tokens in {store.num_documents:,} "
            f"documents, {self.num_held_out:,} more held out",
            "tokenizer": f"{self.run.tokenizer_setting}, {self.tokenizer.vocab_size:,} tokens",
            "step": f"{self.step} of {self.run.num_steps}: {counts.num_rows} rows x "
            f"{counts.row_tokens} tokens in {micro_batches}, "
            f"{len(counts.documents):,} {self._documents}",
            "trained": self._trained(),
            "padding": f"{counts.num_padding:,} of {counts.num_rows * counts.row_tokens:,} places "
            f"({_share(counts.num_padding, counts.num_rows * counts.row_tokens)})",
        }
        if self.row_images is not None:
            found["images"] = (
                f"{counts.num_images:,} of {self.image_places:,} places "
                f"({_share(counts.num_images, self.image_places)}), {self.run.data.image_size} "
                f"pixels wide and high; {counts.num_lookers:,} tokens look at one"
            )
        if virtual := self.run.virtual_ids:
            found["virtual"] = f"{len(virtual)} tokens before every document, counted as its own"
        if counts.tokens_per_byte is not None:
            found["text"] = (
                f"{counts.tokens_per_byte:.3f} tokens per byte, "
                f"{1 / counts.tokens_per_byte:.2f} bytes per token; special tokens left out"
            )
        defects = {
            "targets are not the next token of their document": counts.num_astray,
            "tokens look at an image of another document, or at a later one": (
                counts.num_looks_astray
            ),
        }
        if any(defects.values()):
            found["DEFECT"] = "; ".join(f"{n:,} {what}" for what, n in defects.items() if n)
        return found

    @property
    def row_images(self) -> int | None:
        """Images that a row has at most; None: the data has none."""
        # The protocol of data does not have it: only data with images does.
        return getattr(self.run.data, "row_images", None)

    @property
    def image_places(self) -> int:
        return self.counts.num_rows * (self.row_images or 0)

    def filling(self, row: SeenRow) -> str:
        """Return how full the budgets of a row are."""
        said = f"{row.num_tokens:,} of {self.counts.row_tokens:,} tokens"
        if self.row_images is None:
            return said
        return f"{said}, {len(row.images)} of {self.row_images} images"

    @property
    def _documents(self) -> str:
        """What a segment is: rows of a fixed length cut documents."""
        if self._has_pairs:
            return "texts"
        return "documents" if self.loader.rows.unit == "documents" else "documents or parts of them"

    def _trained(self) -> str:
        counts = self.counts
        if self._has_pairs:
            return f"{counts.num_targets:,} pairs of a chosen and a rejected text"
        if self.is_of_texts:
            number = sum(piece.num_targets > 0 for piece in counts.documents)
            return f"{number:,} of {len(counts.documents):,} documents have a label"
        labelled = " have a label" if self.run.data.labels else ""
        behind = f", {counts.num_behind:,} of them the first behind a row"
        share = _share(counts.num_targets, counts.num_tokens)
        return (
            f"{counts.num_targets:,} of {counts.num_tokens:,} tokens{labelled} ({share})"
            f"{behind if counts.num_behind else ''}"
        )

    def tables(self) -> list[Table]:
        counts = self.counts
        sources = [
            (
                f"{one.num_documents:,}", f"{one.num_tokens:,}",
                _share(one.num_tokens, counts.num_tokens), f"{one.num_targets:,}", name,
            )
            for name, one in counts.sources.items()
        ]  # fmt: skip
        total = sum(counts.classes.values())
        classes = [
            (f"{number:,}", _share(number, total), name)
            for name, number in counts.classes.most_common(MAX_CLASSES)
        ]
        if len(counts.classes) > MAX_CLASSES:
            classes.append(("", "", f".. and {len(counts.classes) - MAX_CLASSES} more"))
        longest = [
            (f"{piece.num_tokens:,}", f"{piece.num_targets:,}", piece.provenance)
            for piece in counts.longest[:MAX_LONGEST]
        ]
        most = max((number for _, _, number in counts.lengths), default=1)
        lengths = [
            (str(first), str(last), f"{number:,}", "\u2588" * -(-number * BAR_WIDTH // most))
            for first, last, number in counts.lengths
        ]
        tables = [
            Table("sources", ("documents", "tokens", "share", "targets", "source"), sources),
            Table("classes", ("targets", "share", "class"), classes),
            Table(f"longest {self._documents}", ("tokens", "targets", "place"), longest),
            Table("lengths", ("from", "to", "documents", ""), lengths),
            Table("rows", ("row", "documents", "tokens", "images", ""), self._rows()),
        ]
        return [table for table in tables if table.rows]

    def _rows(self) -> Sequence[tuple[str, ...]]:
        """Return how full the first rows are; of data without images nothing."""
        counts, width = self.counts, self.counts.row_tokens
        if self.row_images is None:
            return []
        rows: list[tuple[str, ...]] = [
            (
                str(number), f"{row.num_documents:,}", f"{row.num_tokens:,} of {width:,}",
                f"{row.num_images} of {self.row_images}",
                "\u2588" * -(-row.num_tokens * BAR_WIDTH // width),
            )
            for number, row in enumerate(counts.rows[:MAX_ROWS], start=1)
        ]  # fmt: skip
        more: list[tuple[str, ...]] = [
            ("", "", "", "", f".. and {counts.num_rows - MAX_ROWS} more")
        ]
        return rows + more * (counts.num_rows > MAX_ROWS)


def seen_images(tokens: Sequence[SeenToken], row: SeenRow) -> str:
    """Return which images the tokens of a document look at, and how many tokens at each."""
    counts = Counter(number for token in tokens for number in token.looks)
    return ", ".join(
        f"{counts[seen.number]:,} look at image {seen.number} {visible(seen.file)}".rstrip()
        for seen in row.images
        if seen.number in counts
    )


def _number(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"
