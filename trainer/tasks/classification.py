"""Classification: a class for every text, or for every word. Heads as in Hugging Face."""

from dataclasses import dataclass
from typing import cast

from models.heads import (
    SEQUENCE,
    TOKEN,
    CausalLMSpec,
    DecoderSpec,
    sequence_classifier,
    token_classifier,
)
from models.nn.model import DecoderModel
from trainer.data.examples import Labels


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationTask:
    """Train trunk and `score` on one answer per text: a class, several, or numbers."""

    @property
    def head(self) -> str:
        return SEQUENCE

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError for data without a label per text, or a model that takes no head."""
        if labels is None or labels.problem_type is None:
            raise ValueError(
                f"task=sequence_classification needs a label for every text, and the data has "
                f"{_what(labels)}; set data=sequence_labels, or task={_task_of(labels)}"
            )
        decoder(spec)

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        assert labels is not None
        assert labels.problem_type is not None
        return sequence_classifier(
            decoder(spec), num_labels=len(labels.names), problem_type=labels.problem_type
        )

    def eval_metrics(self, nll_sum: float, num_targets: int, num_bytes: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class TokenClassificationTask:
    """Train trunk and token head on one class per word."""

    dropout: float | None = None
    """Before the head, in training; None: the family's own, as in Hugging Face."""

    def __post_init__(self) -> None:
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

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        assert labels is not None
        return token_classifier(decoder(spec), num_labels=len(labels.names), dropout=self.dropout)

    def eval_metrics(self, nll_sum: float, num_targets: int, num_bytes: int) -> dict[str, float]:
        return {}


def decoder(spec: CausalLMSpec) -> DecoderSpec:
    """Return the family's spec, which carries any head; ValueError for a model of another kind."""
    found = getattr(spec, "spec", spec)  # of a model that is read from its folder
    if not hasattr(found, "build_trunk"):
        raise ValueError(
            "model=hf_auto has a language-model head only; classify with model=pretrained"
        )
    return cast(DecoderSpec, found)


def _what(labels: Labels | None) -> str:
    if labels is None:
        return "none"
    return "one for every word" if labels.problem_type is None else "one for every text"


def _task_of(labels: Labels | None) -> str:
    """Return the task that fits the data."""
    if labels is None:
        return "causal_lm"
    return "token_classification" if labels.problem_type is None else "sequence_classification"
