"""Classification heads: one answer per sequence, or one per token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.head import IGNORED, Loss

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True, kw_only=True)
class Emphasis:
    """What training makes more of than the plain loss does; what is logged stays plain."""

    weights: tuple[float, ...] = ()
    """Of each class; of several labels per text: how much a 1 counts beside a 0. Empty: all 1. The
    sum is still divided by the number of targets, not of weights."""
    smoothing: float = 0.0
    """Share of each target that is spread over all classes. Source: Szegedy et al. 2016."""


PLAIN = Emphasis()


class SequenceClassifier(nn.Linear):
    """Score every segment by the hidden state of its last token.

    Packed rows hold several sequences: segments 1..G of a row give logits (B, G, num_labels).
    Padding, left or right, is segment 0 and never counts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        problem_type: str,
        emphasis: Emphasis = PLAIN,
    ) -> None:
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
        self.problem_type, self.emphasis = problem_type, emphasis

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
        return classification_loss(logits, labels, scale, self.problem_type, self.emphasis)


def last_tokens(segment_ids_BT: Tensor, num_segments: int) -> Tensor:
    """Return the (B, G) position of the last token of segments 1..G; 0 where there is none."""
    segments_G = torch.arange(1, num_segments + 1, device=segment_ids_BT.device)
    positions_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    is_in_BGT = segment_ids_BT[:, None, :] == segments_G[:, None]
    return torch.where(is_in_BGT, positions_T, 0).amax(-1)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    problem_type: str,
    emphasis: Emphasis = PLAIN,
) -> Loss:
    """Return the Loss of (.., num_labels) logits: cross-entropy, binary for each label, or squares.

    Counted are rows, rows x labels, or rows x outputs; -100 and NaN are no targets.
    """
    loss = _loss(logits, labels, scale, problem_type, PLAIN)
    if emphasis == PLAIN or not torch.is_grad_enabled():
        return loss
    return loss._replace(objective=_loss(logits, labels, scale, problem_type, emphasis).objective)


def _loss(
    logits: Tensor, labels: Tensor, scale: Tensor, problem_type: str, emphasis: Emphasis
) -> Loss:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "single_label_classification":
        return _cross_entropy(logits, labels, scale, emphasis)
    labels = labels.view(logits.shape).to(logits.dtype)
    is_target = ~labels.isnan()
    # where before the formula, not after it: the gradient of NaN times 0 would be NaN.
    labels = torch.where(is_target, labels, 0.0)
    if problem_type == "regression":
        each = F.mse_loss(logits, labels, reduction="none")
    else:
        smooth = labels * (1.0 - emphasis.smoothing) + 0.5 * emphasis.smoothing
        each = F.binary_cross_entropy_with_logits(
            logits, smooth, pos_weight=_weights(emphasis, logits), reduction="none"
        )
    each = torch.where(is_target, each, 0.0)
    total = each.sum()
    return Loss(total.detach(), is_target.sum(), total * scale, each.detach())


def _cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor, emphasis: Emphasis) -> Loss:
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none",
        weight=_weights(emphasis, logits), label_smoothing=emphasis.smoothing,
    )  # fmt: skip
    each, total = each.view(labels.shape), each.sum()
    return Loss(total.detach(), (labels != IGNORED).sum(), total * scale, each.detach())


def _weights(emphasis: Emphasis, like: Tensor) -> Tensor | None:
    return like.new_tensor(emphasis.weights) if emphasis.weights else None


class TokenClassifier(nn.Linear):
    """Score every token; dropout in front, in training."""

    def __init__(
        self, hidden_size: int, num_labels: int, *, dropout: float, emphasis: Emphasis = PLAIN
    ) -> None:
        super().__init__(hidden_size, num_labels, bias=True)
        self.dropout, self.emphasis = dropout, emphasis

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
        return classification_loss(logits, labels, scale, PROBLEM_TYPES[0], self.emphasis)
