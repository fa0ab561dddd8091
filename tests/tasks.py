"""Tasks over every head, with made-up labels: what the layout tests train."""

from dataclasses import dataclass
from typing import Any

from models import heads
from trainer.data.examples import Labels
from trainer.verify.made_labels import MadeLabels


@dataclass(frozen=True, kw_only=True)
class HeadTask:
    """Train one kind of head, whatever the data is."""

    head: str = heads.CAUSAL_LM
    problem_type: str = "single_label_classification"

    def check(self, spec: Any, labels: Any) -> None:
        assert labels is None  # they are made up

    @property
    def labels(self) -> Labels:
        kind = None if self.head == heads.TOKEN else self.problem_type
        return Labels(names=("a", "b", "c"), problem_type=kind)

    @property
    def relabel(self) -> MadeLabels | None:
        return None if self.head == heads.CAUSAL_LM else MadeLabels(labels=self.labels)

    def metric_names(self, labels: Any) -> tuple[str, ...]:
        return ()

    def build_model(self, spec: Any, labels: Any) -> Any:
        if self.head == heads.SEQUENCE:
            return heads.sequence_classifier(
                spec, num_labels=len(self.labels.names), problem_type=self.problem_type
            )
        if self.head == heads.TOKEN:
            return heads.token_classifier(spec, num_labels=len(self.labels.names), dropout=0.0)
        return spec.build_causal_lm(chunk_tokens=24)
