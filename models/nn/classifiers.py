"""Classification heads: one answer per sequence, or one per token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.head import IGNORED, Loss

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


class SequenceClassifier(nn.Linear):
    """Score every segment by the hidden state of its last token.

    Packed rows hold several sequences: segments 1..G of a row give logits (B, G, num_labels).
    Padding, left or right, is segment 0 and never counts.
    """

    def __init__(self, hidden_size: int, num_labels: int, *, problem_type: str) -> None:
        """Raise ValueError for an unknown problem type, or one label in a classification."""
        if problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type={problem_type!r} is unknown; "
                f"set it to one of {', '.join(PROBLEM_TYPES)}"
            )
        if num_labels < (2 if problem_type == PROBLEM_TYPES[0] else 1):
            raise ValueError(
                f"num_labels={num_labels} is too few for {problem_type}; set num_labels to 2 or "
                "more, or problem_type to regression"
            )
        super().__init__(hidden_size, num_labels, bias=False)
        self.problem_type = problem_type

    def forward(  # type: ignore[override]
        self,
        hidden_BTD: Tensor,
        segment_ids_BT: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        max_segments: int = 1,
    ) -> Tensor | Loss:
        """Return logits (B, G, num_labels), or the Loss against `labels`.

        `labels` decide G: (B, G) int64 with -100 for none (single label), or (B, G, num_labels)
        float with NaN for none (multi-label, regression). Without labels G is `max_segments`.
        """
        num_segments = max_segments if labels is None else labels.shape[1]
        last_BG = last_tokens(segment_ids_BT, num_segments)
        index_BGD = last_BG[:, :, None].expand(-1, -1, hidden_BTD.shape[-1])
        logits = F.linear(hidden_BTD.gather(1, index_BGD), self.weight)
        if labels is None or scale is None:
            return logits
        return classification_loss(logits, labels, scale, self.problem_type)


def last_tokens(segment_ids_BT: Tensor, num_segments: int) -> Tensor:
    """Return the (B, G) position of the last token of segments 1..G; 0 where there is none."""
    segments_G = torch.arange(1, num_segments + 1, device=segment_ids_BT.device)
    positions_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    is_in_BGT = segment_ids_BT[:, None, :] == segments_G[:, None]
    return torch.where(is_in_BGT, positions_T, 0).amax(-1)


def classification_loss(logits: Tensor, labels: Tensor, scale: Tensor, problem_type: str) -> Loss:
    """Return the Loss of (.., num_labels) logits: cross-entropy, binary for each label, or squares.

    Counted are rows, rows x labels, or rows x outputs; -100 and NaN are no targets.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "single_label_classification":
        return _cross_entropy(logits, labels, scale)
    labels = labels.view(logits.shape).to(logits.dtype)
    is_target = ~labels.isnan()
    # where before the formula, not after it: the gradient of NaN times 0 would be NaN.
    labels = torch.where(is_target, labels, 0.0)
    if problem_type == "regression":
        each = F.mse_loss(logits, labels, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    total = torch.where(is_target, each, 0.0).sum()
    return Loss(total.detach(), is_target.sum(), total * scale)


def _cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor) -> Loss:
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return Loss(total.detach(), (labels != IGNORED).sum(), total * scale)


class TokenClassifier(nn.Linear):
    """Score every token; dropout in front, in training."""

    def __init__(self, hidden_size: int, num_labels: int, *, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, bias=True)
        self.dropout = dropout

    def forward(  # type: ignore[override]
        self,
        hidden_BTD: Tensor,
        segment_ids_BT: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | Loss:
        """Return logits (B, T, num_labels), or the Loss against (B, T) labels; -100 is ignored."""
        logits = super().forward(F.dropout(hidden_BTD, self.dropout, self.training))
        if labels is None or scale is None:
            return logits
        return classification_loss(logits, labels, scale, PROBLEM_TYPES[0])
