"""Language-model head fused with cross-entropy: loss and gradients in chunks, never all logits."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Form the gradients of hidden and weight in the forward pass, one chunk of rows at a time.

    With p = softmax(h W^T), d(nll)/d(logits) = p - onehot(label). Its two products with W and h are
    all that backward needs, so a chunk's logits can be dropped at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_XD: Tensor,
        labels_X: Tensor,
        scale: Tensor,
        chunk_tokens: int,
        vocabulary: "Vocabulary",
        *weights_VD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits are those of all `weights_VD`, side by side; frozen ones cost no gradient."""
        needs_hidden, _, _, _, _, *needs_weights = ctx.needs_input_grad
        wide = torch.promote_types(hidden_XD.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_XD) if needs_hidden else None
        # Accumulate over chunks: kept wide, cast once in backward.
        grad_weights = [
            torch.zeros_like(weight, dtype=wide) if needs else None
            for weight, needs in zip(weights_VD, needs_weights, strict=True)
        ]
        total = torch.zeros((), dtype=wide, device=hidden_XD.device)
        for start in range(0, hidden_XD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_XV = project(hidden_XD[rows], weights_VD)
            nll_sum, grad_XV = vocabulary.gradient(logits_XV.to(wide), labels_X[rows], scale)
            total += nll_sum
            parts = grad_XV.to(hidden_XD.dtype).split([len(w) for w in weights_VD], dim=-1)
            if grad_hidden is not None:
                products = (part @ weight for part, weight in zip(parts, weights_VD, strict=True))
                grad_hidden[rows] = sum(products, start=next(products))
            for grad_weight, part in zip(grad_weights, parts, strict=True):
                if grad_weight is not None:
                    _accumulate(grad_weight, part, hidden_XD[rows])
        ctx.save_for_backward(grad_hidden, *grad_weights)
        ctx.dtypes = [weight.dtype for weight in weights_VD]
        ctx.mark_non_differentiable(total)
        return total * scale, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grad_weights = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None,
            None,
            None,
            None,
            *(
                None if grad_weight is None else (grad_weight * grad).to(dtype)
                for grad_weight, dtype in zip(grad_weights, ctx.dtypes, strict=True)
            ),
        )


def project(hidden_XD: Tensor, weights_VD: tuple[Tensor, ...]) -> Tensor:
    """Return the logits of all `weights_VD`, side by side."""
    parts = [F.linear(hidden_XD, weight) for weight in weights_VD]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Vocabulary(Protocol):
    """Computes what needs the logits of all tokens: here of them all, or of this rank's share."""

    def gradient(self, logits_XV: Tensor, labels_X: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nll sum, and the gradient of `scale * sum` with respect to the wide logits."""
        ...

    def nll_sum(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        """Return the nll sum alone."""
        ...

    def whole(self, logits_XV: Tensor) -> Tensor:
        """Return the logits of all tokens."""
        ...


class WholeVocabulary:
    """Every logit is here."""

    def gradient(self, logits_XV: Tensor, labels_X: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # In place from here on: each pass over (X, V) costs as much as a tenth of the products.
        log_p_XV = logits_XV.log_softmax(-1)
        is_target_X1 = (labels_X != IGNORED)[:, None]
        index_X1 = labels_X.clamp(min=0)[:, None]
        # where and masked_fill, not multiplication: 0 * inf of an ignored row would be NaN.
        nll_sum = torch.where(is_target_X1, -log_p_XV.gather(1, index_X1), 0.0).sum()
        grad_XV = log_p_XV.exp_()
        grad_XV.scatter_add_(1, index_X1, grad_XV.new_full(index_X1.shape, -1.0))
        grad_XV.mul_(scale).masked_fill_(~is_target_X1, 0.0)
        return nll_sum, grad_XV

    def nll_sum(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        return F.cross_entropy(logits_XV, labels_X, ignore_index=IGNORED, reduction="sum")

    def whole(self, logits_XV: Tensor) -> Tensor:
        return logits_XV


def _accumulate(total_VD: Tensor, grad_logits_XV: Tensor, hidden_XD: Tensor) -> None:
    """Add `grad_logits^T @ hidden` to the wide total."""
    if total_VD.dtype == hidden_XD.dtype:
        total_VD.addmm_(grad_logits_XV.T, hidden_XD)
    else:
        total_VD += grad_logits_XV.T @ hidden_XD


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
        """Return the (B, T, V) logits, or with labels the Loss. Segments play no part."""
        if labels_BT is not None and scale is not None:
            return self.loss(hidden_BTD, labels_BT, scale)
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
            objective, nll_sum = _ChunkedCrossEntropy.apply(
                hidden_XD, labels_X, scale, self.chunk_tokens, self.vocabulary, *self.weights()
            )
            return Loss(nll_sum, num_targets, objective)
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
