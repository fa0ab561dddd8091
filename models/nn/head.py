"""Language-model head fused with cross-entropy: loss and gradients in chunks, never all logits."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
        ctx: torch.autograd.function.FunctionCtx,
        hidden_XD: Tensor,
        weight_VD: Tensor,
        labels_X: Tensor,
        scale: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        wide = torch.promote_types(hidden_XD.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_XD) if needs_hidden else None
        # Accumulates over chunks: kept wide, cast once in backward.
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_XD.device)
        for start in range(0, hidden_XD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            nll_sum, grad_logits = _chunk(hidden_XD[rows], weight_VD, labels_X[rows], scale, wide)
            total += nll_sum
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_VD
            if grad_weight is not None:
                _accumulate(grad_weight, grad_logits, hidden_XD[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)  # type: ignore[arg-type]
        ctx.dtype = weight_VD.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(total)
        return total * scale, total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtype),  # type: ignore[attr-defined]
            None,
            None,
            None,
        )


def _chunk(
    hidden_XD: Tensor, weight_VD: Tensor, labels_X: Tensor, scale: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the nll sum and the gradient of `scale * sum` with respect to the (X, V) logits."""
    # In place from here on: each pass over (X, V) costs as much as a tenth of the products.
    log_p_XV = (hidden_XD @ weight_VD.T).to(wide).log_softmax(-1)
    is_target_X1 = (labels_X != IGNORED)[:, None]
    index_X1 = labels_X.clamp(min=0)[:, None]
    # where and masked_fill, not multiplication: 0 * inf of an ignored row would be NaN.
    nll_sum = torch.where(is_target_X1, -log_p_XV.gather(1, index_X1), 0.0).sum()
    grad_XV = log_p_XV.exp_()
    grad_XV.scatter_add_(1, index_X1, grad_XV.new_full(index_X1.shape, -1.0))
    grad_XV.mul_(scale).masked_fill_(~is_target_X1, 0.0)
    return nll_sum, grad_XV.to(hidden_XD.dtype)


def _accumulate(total_VD: Tensor, grad_logits_XV: Tensor, hidden_XD: Tensor) -> None:
    """Add `grad_logits^T @ hidden` to the wide total."""
    if total_VD.dtype == hidden_XD.dtype:
        total_VD.addmm_(grad_logits_XV.T, hidden_XD)
    else:
        total_VD += grad_logits_XV.T @ hidden_XD


class LMHead(nn.Linear):
    """Project hidden states onto the vocabulary; with labels, straight to the loss."""

    def __init__(self, hidden_size: int, vocab_size: int, *, chunk_tokens: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.chunk_tokens = chunk_tokens

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor, scale: Tensor) -> Loss:
        """Return the loss against labels that are already shifted (-100 is ignored)."""
        labels_X = labels_BT.flatten()
        hidden_XD = hidden_BTD.flatten(0, 1)
        num_targets = (labels_X != IGNORED).sum()
        if torch.is_grad_enabled():
            objective, nll_sum = _ChunkedCrossEntropy.apply(
                hidden_XD, self.weight, labels_X, scale, self.chunk_tokens
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
            total += nn.functional.cross_entropy(
                (hidden @ self.weight.T).to(wide), labels, ignore_index=IGNORED, reduction="sum"
            )
        return total
