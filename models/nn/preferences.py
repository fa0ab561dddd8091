"""Models that learn from pairs of texts which one is preferred: a reward head, and DPO.

Segments 2g + 1 and 2g + 2 of a row are the chosen and the rejected text of its pair g.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.cache import Cache
from models.nn.classifiers import SequenceClassifier
from models.nn.head import IGNORED, Loss
from models.nn.linear import base_alone
from models.nn.model import DecoderModel


def pair_loss(
    chosen_BG: Tensor, rejected_BG: Tensor, is_pair_BG: Tensor, scale: Tensor, smoothing: float = 0
) -> Loss:
    """Return the sum over pairs of -log sigmoid(chosen - rejected), the targets of the Loss.

    With `smoothing` e the objective is that of labels that are wrong in a share e of the pairs;
    what is logged stays plain. Source: Ouyang et al. 2022, equation 1; Mitchell 2023 (cDPO).
    """
    # where before the formula, not after it: the gradient of NaN times 0 would be NaN.
    margin_BG = torch.where(is_pair_BG, chosen_BG - rejected_BG, 0.0)
    each_BG = torch.where(is_pair_BG, -F.logsigmoid(margin_BG), 0.0)
    total = each_BG.sum()
    # -(1 - e) log s(m) - e log s(-m), as log s(-m) = log s(m) - m.
    objective = total + smoothing * margin_BG.sum() if smoothing else total
    return Loss(total.detach(), is_pair_BG.sum(), objective * scale, each_BG.detach())


def of_pairs(numbers_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Return what (B, 2G, ..) numbers of segments say of the chosen, and of the rejected texts."""
    chosen, rejected = numbers_BG.unflatten(1, (-1, 2)).unbind(2)
    return chosen, rejected


class RewardHead(SequenceClassifier):
    """One number for every text, by its last token: higher for what is preferred."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, problem_type="regression")

    def forward(  # type: ignore[override]
        self,
        hidden_BTD: Tensor,
        segment_ids_BT: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        max_segments: int = 1,
    ) -> Tensor | Loss:
        """Return rewards (B, segments, 1), or the Loss; `labels` (B, G) are -100 for no pair."""
        count = max_segments if labels is None else 2 * labels.shape[1]
        rewards = super().forward(hidden_BTD, segment_ids_BT, max_segments=count)
        assert isinstance(rewards, Tensor)
        if labels is None or scale is None:
            return rewards
        wide = torch.promote_types(rewards.dtype, torch.float32)
        chosen, rejected = of_pairs(rewards[..., 0].to(wide))
        return pair_loss(chosen, rejected, labels != IGNORED, scale)


class PreferenceModel(DecoderModel):
    """A language model with adapters that learns by DPO; its base alone is the reference.

    Both passes are in one `forward`, so that whatever wraps the model sees one, and one backward.
    Source: Rafailov et al. 2023, equation 7.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        beta: float,
        label_smoothing: float,
        **names: str,
    ) -> None:
        super().__init__(trunk, head, **names)
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        cache: Cache | None = None,
        **inputs: Any,
    ) -> Tensor | Loss:
        """Return the Loss; without `scale` log-probabilities (B, 2G, 2) of the texts, by the model
        and by the reference; without `labels` logits.

        `labels` (B, G) are the tokens of each pair's prompt, -100 for no pair.
        """
        if labels is None:
            return super().forward(input_ids, position_ids, segment_ids, cache=cache, **inputs)
        rows = (input_ids, position_ids, segment_ids)
        targets_BT = completions(*rows, labels)
        with torch.no_grad(), base_alone(self.trunk):
            reference = self._log_probs(*rows, targets_BT, 2 * labels.shape[1], inputs)
        model = self._log_probs(*rows, targets_BT, 2 * labels.shape[1], inputs)
        if scale is None:
            return torch.stack((model, reference), -1)
        chosen, rejected = of_pairs(self.beta * (model - reference))
        return pair_loss(chosen, rejected, labels != IGNORED, scale, self.label_smoothing)

    def _log_probs(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        targets_BT: Tensor,
        num_segments: int,
        inputs: dict[str, Any],
    ) -> Tensor:
        """Return (B, segments) sums over the targets of each segment."""
        hidden_BTD = self.hidden_states(input_ids, position_ids, segment_ids, **inputs)
        nll_BT = self.head(hidden_BTD, segment_ids, targets_BT)
        segments = torch.arange(1, num_segments + 1, device=segment_ids.device)
        is_in = segment_ids[:, None, :] == segments[:, None]
        return -torch.where(is_in, nll_BT[:, None, :], 0.0).sum(-1)


def completions(
    input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, prompts_BG: Tensor
) -> Tensor:
    """Return the (B, T) target of each position: the next token, where the prompt is over."""
    num_segments = 2 * prompts_BG.shape[1]
    of_segments = F.pad(prompts_BG.repeat_interleave(2, 1), (1, 0), value=IGNORED)
    of_tokens = of_segments.gather(1, segment_ids.clamp(max=num_segments))
    is_inside = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (0, 1))
    is_target = is_inside & (of_tokens != IGNORED) & (position_ids + 1 >= of_tokens)
    return torch.where(is_target, input_ids.roll(-1, 1), IGNORED)
