"""Classification: a class for every text, or for every word. Heads as in Hugging Face."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from models.heads import (
    SEQUENCE,
    TOKEN,
    CausalLMSpec,
    DecoderSpec,
    sequence_classifier,
    token_classifier,
)
from models.nn.classifiers import PROBLEM_TYPES, classification_loss
from models.nn.head import IGNORED
from models.nn.model import DecoderModel
from trainer.batch import Batch
from trainer.data.examples import PREFERENCE, Labels
from trainer.protocols import Engine
from trainer.tasks import metrics
from trainer.tasks.emphasis import Emphasised
from trainer.tasks.entities import is_tagging
from trainer.tasks.protocol import Judged, Totals

SINGLE_LABEL = PROBLEM_TYPES[0]


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationTask(Emphasised):
    """Train trunk and `score` on one answer per text: a class, several, or numbers."""

    @property
    def head(self) -> str:
        return SEQUENCE

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError for data without a label per text, or a model that takes no head."""
        if labels is None or labels.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"task=sequence_classification needs a label for every text, and the data has "
                f"{_what(labels)}; set data=sequence_labels, or task={_task_of(labels)}"
            )
        decoder(spec)
        self.emphasis(labels)

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        assert labels is not None
        assert labels.problem_type is not None
        return sequence_classifier(
            decoder(spec), num_labels=len(labels.names), problem_type=labels.problem_type,
            emphasis=self.emphasis(labels),
        )  # fmt: skip

    def judge(self, engine: Engine, batch: Batch, number: int, labels: Labels | None) -> Judged:
        """Answers: place, logits and label or labels of each text that has some."""
        assert labels is not None
        assert labels.problem_type is not None
        assert batch.class_labels is not None
        logits = engine.logits(batch).double()
        truth = batch.class_labels.to(logits.device)
        loss = classification_loss(
            logits, truth, torch.ones_like(logits[0, 0, 0]), labels.problem_type
        )
        if labels.problem_type == SINGLE_LABEL:
            is_known, truth = truth != IGNORED, truth[..., None]
        else:
            is_known = ~truth.isnan().all(-1)
        segments = torch.arange(1, truth.shape[1] + 1).expand(truth.shape[:2])
        own = places(batch, number, segments).to(logits.device)[..., None]
        answers = torch.cat((own.double(), logits, truth.double()), -1)
        return Judged(loss.sum, loss.num_targets, answers[is_known])

    def metric_names(self, labels: Labels | None) -> tuple[str, ...]:
        assert labels is not None
        return metrics.OF_TEXTS[str(labels.problem_type)]

    def eval_metrics(self, totals: Totals) -> dict[str, Any]:
        answers, labels = totals.answers, totals.labels
        if answers is None or labels is None or not len(answers):
            return {}
        _, logits, truth = np.split(answers, [1, 1 + len(labels.names)], axis=1)
        if labels.problem_type == SINGLE_LABEL:
            return metrics.single_label(truth[:, 0].astype(int), logits, labels.names)
        if labels.problem_type == "regression":
            return metrics.regression(truth, logits)
        return metrics.multi_label(truth, logits)


@dataclass(frozen=True, kw_only=True)
class TokenClassificationTask(Emphasised):
    """Train trunk and token head on one class per word."""

    dropout: float | None = None
    """Before the head, in training; None: the family's own, as in Hugging Face."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"task.dropout={self.dropout} is no probability below 1; set it to 0.1"
            )

    @property
    def head(self) -> str:
        return TOKEN

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError for data without a label per word, or a model that takes no head."""
        if labels is None or labels.problem_type is not None:
            raise ValueError(
                f"task=token_classification needs a label for every word, and the data has "
                f"{_what(labels)}; set data=token_labels, or task={_task_of(labels)}"
            )
        decoder(spec)
        self.emphasis(labels)

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        assert labels is not None
        return token_classifier(
            decoder(spec), num_labels=len(labels.names), dropout=self.dropout,
            emphasis=self.emphasis(labels),
        )  # fmt: skip

    def judge(self, engine: Engine, batch: Batch, number: int, labels: Labels | None) -> Judged:
        """Answers: place, label, guess and the guess's probability of each word with a label."""
        logits = engine.logits(batch).double()
        truth = batch.labels.to(logits.device)
        loss = classification_loss(logits, truth, torch.ones_like(logits[0, 0, 0]), SINGLE_LABEL)
        own = places(batch, number, batch.segment_ids).to(logits.device)
        confidence, guess = logits.softmax(-1).max(-1)
        each = (own, truth, guess, confidence)
        answers = torch.stack([column.double() for column in each], -1)
        return Judged(loss.sum, loss.num_targets, answers[truth != IGNORED])

    def metric_names(self, labels: Labels | None) -> tuple[str, ...]:
        assert labels is not None
        entities = metrics.OF_ENTITIES if is_tagging(labels.names) else ()
        return (*metrics.OF_TEXTS[SINGLE_LABEL], *entities)

    def eval_metrics(self, totals: Totals) -> dict[str, Any]:
        if totals.answers is None or totals.labels is None or not len(totals.answers):
            return {}
        documents, truth, guess, confidence = totals.answers.T
        return metrics.of_words(
            documents, truth.astype(int), guess.astype(int), confidence, totals.labels.names
        )


def places(batch: Batch, number: int, segments: Tensor) -> Tensor:
    """Return a number for each of (B, n) segments that orders documents through an evaluation."""
    rows = torch.arange(batch.num_rows)[:, None] + number * batch.num_rows
    return rows * (batch.input_ids.shape[1] + 1) + segments.cpu()


def decoder(spec: CausalLMSpec) -> DecoderSpec:
    """Return the family's spec, which carries any head; ValueError for a model of another kind."""
    found = getattr(spec, "spec", spec)  # of a model that is read from its folder
    if not hasattr(found, "build_trunk"):
        raise ValueError("model=hf_auto has a language-model head only; set model=pretrained")
    return cast(DecoderSpec, found)


def _what(labels: Labels | None) -> str:
    if labels is None:
        return "none"
    if labels.problem_type == PREFERENCE:
        return "pairs of texts"
    return "one for every word" if labels.problem_type is None else "one for every text"


def _task_of(labels: Labels | None) -> str:
    """Return the task that fits the data."""
    if labels is None:
        return "causal_lm"
    if labels.problem_type == PREFERENCE:
        return "reward"
    return "token_classification" if labels.problem_type is None else "sequence_classification"
