"""Tasks over every head, with made-up labels: what the layout tests train."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import heads
from models.nn.head import IGNORED

LABELS = 3


@dataclass(frozen=True, kw_only=True)
class HeadTask:
    """Train one kind of head."""

    head: str = heads.CAUSAL_LM
    problem_type: str = "single_label_classification"

    def build_model(self, spec: Any) -> Any:
        if self.head == heads.SEQUENCE:
            return heads.sequence_classifier(
                spec, num_labels=LABELS, problem_type=self.problem_type
            )
        if self.head == heads.TOKEN:
            return heads.token_classifier(spec, num_labels=LABELS, dropout=0.0)
        return spec.build_causal_lm(chunk_tokens=24)

    def relabel(self, rows: dict[str, Tensor], random: torch.Generator) -> dict[str, Tensor]:
        """Return labels of the head for made rows; some are missing."""
        if self.head == heads.CAUSAL_LM:
            return {}
        if self.head == heads.TOKEN:
            classes = torch.randint(0, LABELS, rows["labels"].shape, generator=random)
            return {"labels": torch.where(rows["labels"] == IGNORED, IGNORED, classes)}
        shape = (len(rows["labels"]), 3)
        if self.problem_type == "single_label_classification":
            classes = torch.randint(0, LABELS, shape, generator=random)
            is_missing = torch.rand(shape, generator=random) < 0.2
            return {"class_labels": classes.masked_fill(is_missing, IGNORED)}
        values = torch.rand((*shape, LABELS), generator=random, dtype=torch.float64)
        return {"class_labels": values.masked_fill(values < 0.2, torch.nan)}
