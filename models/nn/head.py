"""Language-model head fused with cross-entropy: loss and gradients in chunks, never all logits."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.chunked import ChunkedCrossEntropy, TokenLoss, Vocabulary, project
from models.nn.sliced import colwise

IGNORED = -100


class Loss(NamedTuple):
    """What one forward pass of one micro-batch costs: 0-dim tensors on the device."""

    sum: Tensor
    """Sum of the negative log-likelihoods in nats, detached: what is logged."""
    num_targets: Tensor
    """How many targets the sum counts (int64)."""
    objective: Tensor
    """`sum * scale`, attached to the graph: what backward starts from."""
    each: Tensor | None = None
    """The loss of each target, detached, in the shape of the labels; 0 where there is none. None:
    not kept, as by a language model's head without gradients."""


class WholeVocabulary:
    """Every logit is here."""

    def gradient(self, logits_XV: Tensor, labels_X: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # In place from here on: each pass over (X, V) costs as much as a tenth of the products.
        log_p_XV = logits_XV.log_softmax(-1)
        is_target_X1 = (labels_X != IGNORED)[:, None]
        index_X1 = labels_X.clamp(min=0)[:, None]
        # where and masked_fill, not multiplication: 0 * inf of an ignored row would be NaN.
        nll_X1 = torch.where(is_target_X1, -log_p_XV.gather(1, index_X1), 0.0)
        grad_XV = log_p_XV.exp_()
        grad_XV.scatter_add_(1, index_X1, grad_XV.new_full(index_X1.shape, -1.0))
        grad_XV.mul_(scale).masked_fill_(~is_target_X1, 0.0)
        return nll_X1[:, 0], grad_XV

    def nll_sum(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        return F.cross_entropy(logits_XV, labels_X, ignore_index=IGNORED, reduction="sum")

    def nll(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        return F.cross_entropy(logits_XV, labels_X, ignore_index=IGNORED, reduction="none")

    def whole(self, logits_XV: Tensor) -> Tensor:
        return logits_XV


class LMHead(nn.Linear):
    """Project hidden states onto the vocabulary; with labels, straight to the loss."""

    def __init__(
        self, hidden_size: int, vocab_size: int, *, chunk_tokens: int, tp_slices: int = 1
    ) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.chunk_tokens = chunk_tokens
        self.tp_slices = tp_slices
        self.vocabulary: Vocabulary = WholeVocabulary()

    def forward(  # type: ignore[override]
        self,
        hidden_BTD: Tensor,
        segment_ids_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | Loss:
        """Return the (B, T, V) logits, with labels the Loss, or (B, T) nll where there is no scale.

        Segments play no part."""
        if labels_BT is not None:
            if scale is not None:
                return self.loss(hidden_BTD, labels_BT, scale)
            nll_X: Tensor = TokenLoss.apply(
                hidden_BTD.flatten(0, 1), labels_BT.flatten(), self.chunk_tokens, self.vocabulary,
                *self.weights(),
            )  # fmt: skip
            return nll_X.view(labels_BT.shape)
        if self.tp_slices > 1:
            return colwise(hidden_BTD, self, self.tp_slices)
        return self.vocabulary.whole(project(hidden_BTD, self.weights()))

    def weights(self) -> tuple[Tensor, ...]:
        """Return the rows of the vocabulary, in one part or more."""
        return (self.weight,)

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor, scale: Tensor) -> Loss:
        """Return the loss against labels that are already shifted (-100 is ignored)."""
        labels_X = labels_BT.flatten()
        hidden_XD = hidden_BTD.flatten(0, 1)
        num_targets = (labels_X != IGNORED).sum()
        if torch.is_grad_enabled():
            objective, nll_sum, nll_X = ChunkedCrossEntropy.apply(
                hidden_XD, labels_X, scale, self.chunk_tokens, self.vocabulary, *self.weights()
            )
            return Loss(nll_sum, num_targets, objective, nll_X.view(labels_BT.shape))
        nll_sum = self._nll_sum(hidden_XD, labels_X)
        return Loss(nll_sum, num_targets, nll_sum * scale)

    def _nll_sum(self, hidden_XD: Tensor, labels_X: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_XD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_XD.device)
        chunks = zip(
            hidden_XD.split(self.chunk_tokens), labels_X.split(self.chunk_tokens), strict=True
        )
        for hidden, labels in chunks:
            logits_XV = project(hidden, self.weights()).to(wide)
            total += self.vocabulary.nll_sum(logits_XV, labels)
        return total
