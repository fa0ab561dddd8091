"""Unigram and bigram models counted on the run's training data: what any model must beat."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from models.nn.head import IGNORED
from trainer.batch import Batch
from trainer.callbacks.protocol import Callback, RunView
from trainer.notes import BASELINES, write_note
from trainer.progress import Progress
from trainer.run_tokenizer import tokenizer_at_hand

if TYPE_CHECKING:
    from trainer.run import Run  # which lists callbacks itself

log = logging.getLogger(__name__)
SMOOTHING = 0.1  # added to every count: unseen pairs get a probability
MAX_VOCABULARY = 4096  # the table of pairs has its square of entries
METRIC = "bits_per_byte"


@dataclass(frozen=True, kw_only=True)
class NgramBaselines:
    """At the end, compare held-out bits per byte with n-grams of the same training tokens."""

    def check(self, run: "Run") -> None:
        """Raise ValueError for a task without bits per byte, virtual tokens, or many tokens."""
        names = run.task.metric_names(run.data.labels)
        if METRIC not in names:
            raise ValueError(
                f"callbacks.ngrams compares {METRIC}, and evaluations of this task have "
                f"{', '.join(names)}; set callbacks.ngrams=null"
            )
        if run.virtual_ids:
            raise ValueError(
                "callbacks.ngrams counts pairs of tokens, and virtual tokens stand before the "
                "first one; set callbacks.ngrams=null"
            )
        tokenizer = tokenizer_at_hand(run.data, run.tokenizer_setting, run.model)
        size = tokenizer.vocab_size if tokenizer else run.model.vocab_size  # what a bpe gets
        if size > MAX_VOCABULARY:
            raise ValueError(
                f"callbacks.ngrams counts pairs of at most {MAX_VOCABULARY} tokens, "
                f"the tokenizer has {size}; set callbacks.ngrams=null"
            )

    def build(self) -> "NgramCallback":
        return NgramCallback()


class NgramCallback(Callback):
    """Counts at the end of the run, on rank 0."""

    bits_per_byte: float | None = None

    def on_start(self, view: RunView, progress: Progress) -> None:
        self.view = view

    def on_eval(self, progress: Progress, metrics: dict[str, Any]) -> None:
        self.bits_per_byte = metrics[METRIC]

    def on_end(self, progress: Progress, *, finished: bool) -> None:
        if not finished or not self.view.is_main:
            return
        if self.view.run.eval_every is None:
            log.info("no n-grams to compare with: the run evaluates nothing; set eval_every")
        if self.bits_per_byte is None:  # or an earlier start came to the end
            return
        if not math.isfinite(self.bits_per_byte):  # of text whose bytes nobody counted, or diverged
            log.info("no n-grams to compare with: bits per byte are %s", self.bits_per_byte)
            return
        unigram, bigram = self._baselines(progress.step)
        found = {"unigram": unigram, "bigram": bigram}
        said = {"metric": METRIC, "step": progress.step, "values": found}
        write_note(self.view.folder, BASELINES, said)
        log.info("")
        log.info("held-out bits per byte (n-grams are counted on the same training tokens):")
        for name, value in (
            ("unigram", unigram),
            ("bigram", bigram),
            ("model", self.bits_per_byte),
        ):
            log.info("  %-8s %6.3f  %s", name, value, "#" * round(value * 8))

    def _baselines(self, num_steps: int) -> tuple[float, float]:
        loader, evaluation = self.view.loader, self.view.eval_loader
        assert evaluation is not None
        alone = replace(loader, rank=0, num_ranks=1)
        trained = (b for number in range(num_steps) for b in alone.step(number).micro_batches)
        counts = pair_counts(trained, self.view.tokenizer.vocab_size)
        held_out = pair_counts(
            (batch for _, batch in replace(evaluation, rank=0, num_ranks=1).batches()),
            self.view.tokenizer.vocab_size,
        )
        num_bytes = evaluation.num_bytes
        return unigram_bits(counts, held_out) / num_bytes, bigram_bits(counts, held_out) / num_bytes


def pair_counts(batches: Iterator[Batch], vocab_size: int) -> np.ndarray:
    """Count (input, target) pairs: a (V, V) table of every trained position."""
    counts = np.zeros(vocab_size * vocab_size, np.int64)
    for batch in batches:
        labels = batch.labels.numpy().ravel()
        is_target = labels != IGNORED
        pairs = batch.input_ids.numpy().ravel()[is_target] * vocab_size + labels[is_target]
        np.add.at(counts, pairs, 1)
    return counts.reshape(vocab_size, vocab_size)


def unigram_bits(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the code length of the held-out targets in bits, each coded by its frequency."""
    smoothed = train.sum(0) + SMOOTHING
    return float(-(held_out.sum(0) * np.log2(smoothed / smoothed.sum())).sum())


def bigram_bits(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the code length of the held-out targets in bits, each coded by its predecessor."""
    smoothed = train + SMOOTHING
    return float(-(held_out * np.log2(smoothed / smoothed.sum(1, keepdims=True))).sum())
