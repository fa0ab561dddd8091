"""Cross-entropy over a vocabulary, a chunk of tokens at a time: the sum, or every token's own."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements: 4 MiB in fp32 stay in a CPU's cache; a GPU gets few kernels for a large vocabulary.
SCALED_AT_ONCE, SCALED_AT_ONCE_ON_GPU = 2**20, 2**26


class Vocabulary(Protocol):
    """Computes what needs the logits of all tokens: here of them all, or of this rank's share."""

    def gradient(
        self, logits_XV: Tensor, labels_X: Tensor, scale_X1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return `nll`, and the gradient of `scale * nll` with respect to the logits.

        The nll is in at least fp32, the gradient in the dtype of the logits, whose memory it may
        take over. No scale is 1.
        """
        ...

    def nll_sum(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        """Return the nll sum alone."""
        ...

    def nll(self, logits_XV: Tensor, labels_X: Tensor) -> Tensor:
        """Return (X,) the nll of each token; 0 where it is ignored."""
        ...

    def whole(self, logits_XV: Tensor) -> Tensor:
        """Return the logits of all tokens."""
        ...


class ChunkedCrossEntropy(torch.autograd.Function):
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
        vocabulary: Vocabulary,
        *weights_VD: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits are those of all `weights_VD`, side by side; frozen ones cost no gradient."""
        needs_hidden, _, _, _, _, *needs_weights = ctx.needs_input_grad
        total, nll_X, grad_hidden, grad_weights = _gradients(
            hidden_XD, labels_X, None, chunk_tokens, vocabulary, weights_VD,
            needs_hidden=needs_hidden, needs_weights=needs_weights,
        )  # fmt: skip
        ctx.save_for_backward(scale, grad_hidden, *grad_weights)
        ctx.dtypes = [each.dtype for each in (hidden_XD, *weights_VD)]
        ctx.mark_non_differentiable(total, nll_X)
        return total * scale, total, nll_X

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Here, and not token by token: a pass over (X, V) costs as much as a tenth of the products.
        # Wide: 1/3 as bf16 is 0.2 % too much, and would be for all gradients below the head.
        scale, *gradients = ctx.saved_tensors
        factor = grad * scale
        grad_hidden, *grad_weights = (
            None if each is None else _scaled(each, factor, dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return grad_hidden, None, None, None, None, *grad_weights


class TokenLoss(torch.autograd.Function):
    """The nll of every token, for losses that are no plain sum of them.

    What each token's gradient is multiplied by is known in backward only, so its logits are formed
    a second time there: one more product for not keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_XD: Tensor,
        labels_X: Tensor,
        chunk_tokens: int,
        vocabulary: Vocabulary,
        *weights_VD: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden_XD, labels_X, *weights_VD)
        ctx.chunk_tokens, ctx.vocabulary = chunk_tokens, vocabulary
        wide = torch.promote_types(hidden_XD.dtype, torch.float32)
        chunks = zip(hidden_XD.split(chunk_tokens), labels_X.split(chunk_tokens), strict=True)
        return torch.cat(
            [vocabulary.nll(project(h, weights_VD).to(wide), labels) for h, labels in chunks]
        )

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[Tensor | None, ...]:
        hidden_XD, labels_X, *weights_VD = ctx.saved_tensors
        needs_hidden, _, _, _, *needs_weights = ctx.needs_input_grad
        _, _, grad_hidden, grad_weights = _gradients(
            hidden_XD, labels_X, grad_X[:, None], ctx.chunk_tokens, ctx.vocabulary,
            tuple(weights_VD), needs_hidden=needs_hidden, needs_weights=needs_weights,
        )  # fmt: skip
        return (
            grad_hidden,
            None,
            None,
            None,
            *(
                None if grad is None else grad.to(weight.dtype)
                for grad, weight in zip(grad_weights, weights_VD, strict=True)
            ),
        )


def _gradients(
    hidden_XD: Tensor,
    labels_X: Tensor,
    scale_X1: Tensor | None,
    chunk_tokens: int,
    vocabulary: Vocabulary,
    weights_VD: tuple[Tensor, ...],
    *,
    needs_hidden: bool,
    needs_weights: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
    """Return the nll sum, the nll of each token, and the gradients of `scale * nll`."""
    wide = torch.promote_types(hidden_XD.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden_XD) if needs_hidden else None
    # Accumulate over chunks: kept wide, cast once in backward.
    made = torch.empty_like if len(hidden_XD) else torch.zeros_like  # the first chunk overwrites
    grad_weights = [
        made(weight, dtype=wide) if needs else None
        for weight, needs in zip(weights_VD, needs_weights, strict=True)
    ]
    nll_X = torch.empty(len(hidden_XD), dtype=wide, device=hidden_XD.device)
    total = nll_X.new_zeros(())
    for start in range(0, hidden_XD.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits_XV = project(hidden_XD[rows], weights_VD)
        own_scale = None if scale_X1 is None else scale_X1[rows]
        own_X, grad_XV = vocabulary.gradient(logits_XV, labels_X[rows], own_scale)
        nll_X[rows] = own_X
        total += own_X.sum()
        parts = grad_XV.split([len(w) for w in weights_VD], dim=-1)
        if grad_hidden is not None:
            products = (part @ weight for part, weight in zip(parts, weights_VD, strict=True))
            grad_hidden[rows] = sum(products, start=next(products))
        for grad_weight, part in zip(grad_weights, parts, strict=True):
            if grad_weight is not None:
                _accumulate(grad_weight, part, hidden_XD[rows], is_first=start == 0)
        del logits_XV, grad_XV, parts, part  # the next chunk gets their memory
    return total, nll_X, grad_hidden, grad_weights


def project(hidden_XD: Tensor, weights_VD: tuple[Tensor, ...]) -> Tensor:
    """Return the logits of all `weights_VD`, side by side."""
    parts = [F.linear(hidden_XD, weight) for weight in weights_VD]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _accumulate(
    total_VD: Tensor, grad_logits_XV: Tensor, hidden_XD: Tensor, *, is_first: bool
) -> None:
    """Add `grad_logits^T @ hidden` to the wide total, of which the first one is all."""
    if total_VD.dtype == hidden_XD.dtype:
        total_VD.addmm_(grad_logits_XV.T, hidden_XD, beta=0 if is_first else 1)
    elif is_first:
        total_VD.copy_(grad_logits_XV.T @ hidden_XD)
    else:
        total_VD += grad_logits_XV.T @ hidden_XD


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (X, D) `x * factor`, multiplied in at least fp32 and rounded once.

    The factor may be wider, as a quotient of counts is: fp64 for all of x would take 8 bytes for
    each of its numbers, twice. And all products in fp32 would be a second gradient: a few rows are
    scaled at a time.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    found = torch.empty_like(x, dtype=dtype)
    rows = max(1, (SCALED_AT_ONCE if x.is_cpu else SCALED_AT_ONCE_ON_GPU) // x.shape[1])
    for part, target in zip(x.split(rows), found.split(rows), strict=True):
        target.copy_(part.to(wide) * factor.to(wide))
    return found
