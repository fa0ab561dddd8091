"""Made-up labels for made-up rows, of the kind that the user's head learns; some are missing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.nn.head import IGNORED
from trainer.data.examples import PREFERENCE, Labels

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
        if self.labels.problem_type == PREFERENCE:
            return {"class_labels": self._pairs(len(rows["labels"]), random)}
        shape = (len(rows["labels"]), SEGMENTS)
        if self.labels.problem_type == "single_label_classification":
            classes = torch.randint(0, count, shape, generator=random)
            is_missing = torch.rand(shape, generator=random) < MISSING
            return {"class_labels": classes.masked_fill(is_missing, IGNORED)}
        values = torch.rand((*shape, count), generator=random, dtype=torch.float64)
        return {"class_labels": values.masked_fill(values < MISSING, torch.nan)}

    def _pairs(self, num_rows: int, random: torch.Generator) -> Tensor:
        """Return the tokens of the prompts of two pairs: segments 1 and 2; 3 is left over."""
        prompts = torch.randint(0, 4, (num_rows, 2), generator=random)
        is_missing = torch.rand((num_rows, 2), generator=random) < MISSING
        is_missing[:, 1] = True
        return prompts.masked_fill(is_missing, IGNORED)
