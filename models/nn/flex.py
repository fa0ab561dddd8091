"""torch's flex_attention: a fused kernel that skips the blocks which a mask leaves empty."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.nn.segments import Segments

# Every size that is 1 or not (rows, queries, blocks), grouping, causality and gradients make a
# kind of shape: training, evaluation and generation together exceed torch's default of 8.
MAX_GRAPHS = 64


class Flex:
    """flex_attention, compiled on CUDA. Source: Dong et al. 2024.

    On the CPU it computes all scores, and torch has no backward pass for it there. More kinds of
    shapes than MAX_GRAPHS are an error, never the unfused computation.
    """

    def __init__(self) -> None:
        self.unfused: Any = torch.compile(flex_attention, backend="eager", fullgraph=True)
        self.fused, self.block_mask = self.unfused, create_block_mask
        if torch.cuda.is_available():
            self.fused = torch.compile(flex_attention, fullgraph=True)
            self.block_mask = torch.compile(create_block_mask)  # never holds the (T, S) mask

    def prepare(self, segments: Segments) -> BlockMask:
        (batch, length), device = segments.query.shape, segments.query.device
        create = self.block_mask if device.type == "cuda" else create_block_mask
        with _fusing():
            return create(
                _looks(segments),
                B=batch,
                H=None,
                Q_LEN=length,
                KV_LEN=segments.key.shape[1],
                device=str(device),
            )

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: BlockMask,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """Raise ValueError for dropout, for float64 but on the CPU, and for gradients there."""
        if dropout > 0:
            raise ValueError(
                f"attn_implementation='flex' has no attention dropout, and attention_dropout="
                f"{dropout}; set it to 0, or attn_implementation to sdpa"
            )
        if query_BNTH.dtype == torch.float64 and query_BNTH.device.type != "cpu":
            raise ValueError(
                "attn_implementation='flex' got torch.float64, and its kernels add up in float32; "
                "set attn_implementation to sdpa, or the precision to fp32 or bf16"
            )
        inputs = (query_BNTH, key_BKSH, value_BKSH)
        if query_BNTH.device.type == "cpu" and any(x.requires_grad for x in inputs):
            raise ValueError(
                "attn_implementation='flex' on the CPU has no backward pass, and a gradient is "
                "needed; train on a CUDA GPU, or set attn_implementation to sdpa or auto"
            )
        settings: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": True}
        if torch.compiler.is_compiling():  # inside a compiled block, which fuses it
            return flex_attention(*inputs, **settings)
        attention = self.fused if query_BNTH.device.type == "cuda" else self.unfused
        with _fusing():
            return attention(*inputs, **settings)


@contextmanager
def _fusing() -> Iterator[None]:
    """Compile under force_eager too: it is there for blocks, and whole scores take memory."""
    with (
        torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS),
        torch.compiler.set_stance("default"),
    ):
        yield


def _looks(segments: Segments) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return segments.dense_mask as a function of batch, head, query and key indices."""
    query_BT, key_BS, slots_T = segments.query, segments.key, segments.slots

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query_BT[batch, query] == key_BS[batch, key]

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within(batch, head, query, key) & (key <= slots_T[query])

    return causal if segments.causal else within
