"""Attention over an explicit mask: the eager reference; and torch's fused sdpa.

sdpa needs no mask where documents say who sees whom: on a CPU it takes them one by one.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.nn import document_attention
from models.nn.documents import Documents, documents_of
from models.nn.segments import Segments, dense_mask


class Eager:
    """The slow, obvious reference: softmax in at least fp32 over the masked scores."""

    def __init__(self, *, is_wide: bool = True, shrink: int = 1) -> None:
        """`is_wide` false: softmax in the dtype of the scores. `shrink` divides half-precision
        scores until they are in fp32: large layers overflow less.
        """
        self.is_wide, self.shrink = is_wide, shrink

    def prepare(self, segments: Segments) -> Tensor:
        return dense_mask(segments)

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: Tensor | None,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """`mask` is (B or 1, N or 1, T, S) boolean, True where a query may look; None: anywhere."""
        key_BNSH = repeat_heads(key_BKSH, query_BNTH)
        value_BNSH = repeat_heads(value_BKSH, query_BNTH)
        wide = torch.promote_types(query_BNTH.dtype, torch.float32)
        shrink = self.shrink if query_BNTH.dtype != wide else 1
        scores_BNTS = query_BNTH @ key_BNSH.transpose(-1, -2) * (scale / shrink)
        if self.is_wide:
            scores_BNTS = scores_BNTS.to(wide) * shrink
        if mask is not None:
            scores_BNTS = scores_BNTS.masked_fill(~mask, -math.inf)
        weights_BNTS = scores_BNTS.softmax(-1).to(value_BNSH.dtype)
        if mask is not None:
            # A query without keys has a softmax of NaN: its output and all its gradients are 0.
            weights_BNTS = weights_BNTS.masked_fill(~mask, 0.0)
        return F.dropout(weights_BNTS, dropout) @ value_BNSH


class Sdpa:
    """torch's fused attention with the exact mask, or by document."""

    def __init__(self, *, has_dropout: bool = False) -> None:
        """With dropout there is always a mask: what is dropped is drawn for whole rows."""
        self.has_dropout = has_dropout

    def prepare(self, segments: Segments) -> Tensor | Documents:
        documents = None if self.has_dropout else documents_of(segments)
        return dense_mask(segments) if documents is None else documents

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: Tensor | Documents | None,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """`mask` as in Eager.attend, or documents, which go without dropout."""
        if isinstance(mask, Documents):
            assert not dropout, "Sdpa(has_dropout=True) prepares what has dropout"
            return document_attention.attend(query_BNTH, key_BKSH, value_BKSH, mask, scale)
        # With a mask, CUDA's fused kernels take no grouped heads; the CPU's do.
        is_grouped = query_BNTH.device.type == "cpu"
        if not is_grouped:
            key_BKSH, value_BKSH = (repeat_heads(x, query_BNTH) for x in (key_BKSH, value_BKSH))
        return F.scaled_dot_product_attention(
            query_BNTH,
            key_BKSH,
            value_BKSH,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=is_grouped,
        )


def repeat_heads(x_BKSH: Tensor, query_BNTH: Tensor) -> Tensor:
    """Repeat each key/value head N/K times contiguously: k0, k0, k1, k1, not tiled."""
    groups = query_BNTH.shape[1] // x_BKSH.shape[1]
    return x_BKSH if groups == 1 else x_BKSH.repeat_interleave(groups, dim=1)
