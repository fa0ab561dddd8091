"""Ulysses: for attention, ranks exchange tokens for heads: each has whole rows of some heads.

Between attention layers each rank has the tokens that context_parallel deals it. Source: Jacobs et
al. 2023 (DeepSpeed Ulysses).
"""

from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.nn.backends import Backend
from models.nn.segments import Segments
from trainer.parallel.collectives import TOKENS, exchanged
from trainer.parallel.context_parallel import all_tokens, as_held, in_order

HEADS = 2  # the dimension of a (B, T, N, H) tensor that heads lie along


@dataclass(frozen=True)
class _WholeRows:
    """What the back-end prepared for whole rows."""

    mask: Any


class Ulysses:
    """A back-end over another one, which sees the whole rows of this rank's share of the heads."""

    def __init__(self, backend: Backend, group: dist.ProcessGroup) -> None:
        self.backend, self.group = backend, group

    def prepare(self, segments: Segments) -> Any:
        if not (segments.is_self and segments.causal):
            return self.backend.prepare(segments)  # cross-attention: every rank has all the keys
        whole = all_tokens(segments.query, self.group)
        return _WholeRows(self.backend.prepare(Segments.within(whole)))

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: Any,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """The number of ranks divides N."""
        if not isinstance(mask, _WholeRows):
            return self.backend.attend(
                query_BNTH, key_BKSH, value_BKSH, mask, dropout=dropout, scale=scale
            )
        query, key, value = self._whole_rows(query_BNTH, key_BKSH, value_BKSH)
        mixed_BNTH = self.backend.attend(query, key, value, mask.mask, dropout=dropout, scale=scale)
        mixed_BTNH = as_held(mixed_BNTH.transpose(1, 2), self.group.size())
        return exchanged(mixed_BTNH, self.group, give=TOKENS, take=HEADS).transpose(1, 2)

    def _whole_rows(
        self, query_BNTH: Tensor, key_BKSH: Tensor, value_BKSH: Tensor
    ) -> tuple[Tensor, ...]:
        """Return all tokens of this rank's heads. One message for the three."""
        size = self.group.size()
        # Fewer key heads than ranks are repeated: those of a rank are those that its queries use.
        copies = lcm(key_BKSH.shape[1], size) // key_BKSH.shape[1]
        repeated = (x.repeat_interleave(copies, dim=1) for x in (key_BKSH, value_BKSH))
        shares = [x.transpose(1, 2).unflatten(HEADS, (size, -1)) for x in (query_BNTH, *repeated)]
        counts = [share.shape[HEADS + 1] for share in shares]
        mine_BtMH = torch.cat(shares, HEADS + 1).flatten(HEADS, HEADS + 1)
        all_BTMH = in_order(exchanged(mine_BtMH, self.group, give=HEADS, take=TOKENS), size)
        return tuple(part.transpose(1, 2) for part in all_BTMH.split(counts, HEADS))
