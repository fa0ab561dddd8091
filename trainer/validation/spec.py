"""When answers are written and judged, how many, and by which metrics."""

from dataclasses import dataclass

from trainer.data.document_data import DocumentData
from trainer.data.protocol import DataSpec
from trainer.validation.scores import check_metrics

COUNT = "num_answers"
VALIDATION = "validation.html"  # in the folder of a run


@dataclass(frozen=True, kw_only=True)
class ValidationSpec:
    """Answers to held-out questions: the likeliest token each time, no sampling."""

    every: int | None = None
    """Every such many evaluations, and at the last one, the model writes answers; null: never."""
    max_documents: int | None = 64
    """Held-out documents whose questions are asked, drawn once for all; null: all."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    batch_documents: int = 8
    """Questions that are answered together."""
    metrics: tuple[str, ...] = ("exact_match", "anls")
    """Of exact_match, anls, bleu, rouge_1, rouge_2, rouge_l."""
    samples: int = 20
    """Questions and answers that the page shows."""

    def __post_init__(self) -> None:
        for name in ("every", "max_documents", "max_new_tokens", "batch_documents", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"validation.{name}={value} is not positive; set it to 1 or more")

    def check(self, data: DataSpec, eval_every: int | None) -> None:
        """Raise ValueError where there is nobody to ask, or nothing to judge by."""
        if self.every is None:
            return
        if eval_every is None:
            raise ValueError(
                f"validation.every={self.every} counts evaluations, and there are none; set "
                "eval_every, or validation.every=null"
            )
        if not isinstance(data, DocumentData) or data.labels is not None:
            raise ValueError(
                f"validation.every={self.every} needs documents that ask and answer in words; set "
                "data=chat or data=vision_text, or validation.every=null"
            )
        check_metrics(self.metrics)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The numbers that an evaluation with answers has more than others."""
        return () if self.every is None else (*self.metrics, COUNT)
