"""Language-model head fused with cross-entropy: loss and gradients in chunks, never all logits."""

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.chunked import ChunkedCrossEntropy, TokenLoss, Vocabulary, project
from models.nn.kernel_counts import counted
from models.nn.segments import has_values_here
from models.nn.sliced import colwise

IGNORED = -100
CACHED_LOGITS = 2**19  # in fp32 and in bf16 these are 3 MiB: they stay in a CPU's cache


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
    """Every logit is here.

    All passes go over a few rows of logits, then over the next: what lies in a CPU's cache is not
    fetched from memory again. None: over all rows at once, as on a GPU.
    """

    def __init__(self, cached_logits: int | None = CACHED_LOGITS) -> None:
        self.cached_logits = cached_logits

    def gradient(
        self, logits_XV: Tensor, labels_X: Tensor, scale_X1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = len(logits_XV)
        if self.cached_logits is not None and logits_XV.is_cpu:
            rows = max(1, self.cached_logits // logits_XV.shape[1])
        scales = repeat(None) if scale_X1 is None else scale_X1.split(rows)
        blocks = zip(logits_XV.split(rows), labels_X.split(rows), scales, strict=False)
        nll = [_to_gradient(*block) for block in blocks]
        return torch.cat(nll), logits_XV

    def nll_sum(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        return F.cross_entropy(logits_XV, labels_X, ignore_index=IGNORED, reduction="sum")

    def nll(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        return F.cross_entropy(logits_XV, labels_X, ignore_index=IGNORED, reduction="none")

    def whole(self, logits_XV: Tensor) -> Tensor:
        return logits_XV


def _to_gradient(logits_XV: Tensor, labels_X: Tensor, scale_X1: Tensor | None) -> Tensor:
    """Return the nll; leave the gradient in place of the logits. Softmax is the only exponential:
    its largest probability is 1 / sum of exp(logit - largest logit)."""
    is_target_X1 = (labels_X != IGNORED)[:, None]
    index_X1 = labels_X.clamp(min=0)[:, None]
    p_XV = logits_XV.softmax(-1, dtype=torch.promote_types(logits_XV.dtype, torch.float32))
    top_X1 = logits_XV.amax(-1, keepdim=True).to(p_XV.dtype)
    nll_X1 = top_X1 - logits_XV.gather(1, index_X1) - p_XV.amax(-1, keepdim=True).log()
    p_XV.scatter_add_(1, index_X1, p_XV.new_full(index_X1.shape, -1.0))
    logits_XV.copy_(p_XV if scale_X1 is None else p_XV.mul_(scale_X1))
    # where and fills, not multiplication: 0 * inf of an ignored row would be NaN.
    if has_values_here(labels_X):  # few rows, if any: a mask is looked at for every number
        logits_XV.index_fill_(0, (labels_X == IGNORED).nonzero()[:, 0], 0.0)
    else:
        logits_XV.masked_fill_(~is_target_X1, 0.0)
    return torch.where(is_target_X1, nll_X1, 0.0)[:, 0]


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
            hidden_XD, labels_X, places = _with_targets(hidden_BTD, labels_BT)
            nll_X: Tensor = TokenLoss.apply(
                hidden_XD, labels_X, self.chunk_tokens, self.vocabulary, *self.weights()
            )
            return _in_place(nll_X, places, labels_BT)
        if self.tp_slices > 1:
            return colwise(hidden_BTD, self, self.tp_slices)
        return self.vocabulary.whole(project(hidden_BTD, self.weights()))

    def weights(self) -> tuple[Tensor, ...]:
        """Return the rows of the vocabulary, in one part or more."""
        return (self.weight,)

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor, scale: Tensor) -> Loss:
        """Return the loss against labels that are already shifted (-100 is ignored)."""
        num_targets = (labels_BT != IGNORED).sum()
        hidden_XD, labels_X, places = _with_targets(hidden_BTD, labels_BT)
        if torch.is_grad_enabled():
            objective, nll_sum, nll_X = ChunkedCrossEntropy.apply(
                hidden_XD, labels_X, scale, self.chunk_tokens, self.vocabulary, *self.weights()
            )
            return Loss(nll_sum, num_targets, objective, _in_place(nll_X, places, labels_BT))
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


def _with_targets(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states and labels token by token, and which tokens these are.

    Tokens without a target are left out on a CPU; a GPU would have to be waited for, to say how
    many there are. None: these are all.
    """
    hidden_XD, labels_X = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    if not has_values_here(labels_X):
        return hidden_XD, labels_X, None
    is_target_X = labels_X != IGNORED
    places = is_target_X.nonzero()[:, 0]
    others = (~is_target_X).nonzero()[: counted(len(places), hidden_XD.dtype) - len(places), 0]
    places = torch.cat((places, others))
    if len(places) == len(labels_X):
        return hidden_XD, labels_X, None
    return hidden_XD.index_select(0, places), labels_X[places], places


def _in_place(nll_X: Tensor, places: Tensor | None, labels_BT: Tensor) -> Tensor:
    """Return the nll of all tokens, in the shape of the labels."""
    if places is not None:
        nll_X = nll_X.new_zeros(labels_BT.numel()).index_copy(0, places, nll_X)
    return nll_X.view(labels_BT.shape)
