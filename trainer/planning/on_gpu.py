"""A model as a GPU computes it: attention keeps no mask, the loss takes all rows of a chunk."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.dense import Sdpa
from models.nn.head import LMHead, WholeVocabulary
from models.nn.segments import Segments


class Maskless:
    """What flex, varlen and flash keep for the backward pass; the numbers mean nothing."""

    def prepare(self, segments: Segments) -> bool:
        return segments.causal and segments.is_self

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: bool,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """`mask` says whether it is causal."""
        return F.scaled_dot_product_attention(
            query_BNTH, key_BKSH, value_BKSH,
            dropout_p=dropout, is_causal=mask, scale=scale, enable_gqa=True,
        )  # fmt: skip


def as_on_gpu(model: nn.Module, *, has_masks: bool) -> None:
    """Let a planned model keep what it keeps on a GPU, in place."""
    shared = Maskless()
    for module in model.modules():
        backend: Any = getattr(module, "backend", None)
        if isinstance(backend, Sdpa) and not has_masks:
            setattr(module, "backend", shared)  # noqa: B010  no field that types know
        if isinstance(module, LMHead) and isinstance(module.vocabulary, WholeVocabulary):
            module.vocabulary = WholeVocabulary(cached_logits=None)
