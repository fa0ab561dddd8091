"""Made-up labels for made-up rows, of the kind that the user's head learns; some are missing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.nn.head import IGNORED
from trainer.data.examples import Labels

SEGMENTS, MISSING = 3, 0.2  # documents of a row that MadeRows makes, and how many have no label


@dataclass(frozen=True, kw_only=True)
class MadeLabels:
    """Returns `labels` or `class_labels` of a Batch for the rows of MadeRows."""

    labels: Labels

    def __call__(self, rows: dict[str, Tensor], random: torch.Generator) -> dict[str, Tensor]:
        count = len(self.labels.names)
        if self.labels.problem_type is None:
            classes = torch.randint(0, count, rows["labels"].shape, generator=random)
            return {"labels": torch.where(rows["labels"] == IGNORED, IGNORED, classes)}
        shape = (len(rows["labels"]), SEGMENTS)
        if self.labels.problem_type == "single_label_classification":
            classes = torch.randint(0, count, shape, generator=random)
            is_missing = torch.rand(shape, generator=random) < MISSING
            return {"class_labels": classes.masked_fill(is_missing, IGNORED)}
        values = torch.rand((*shape, count), generator=random, dtype=torch.float64)
        return {"class_labels": values.masked_fill(values < MISSING, torch.nan)}
