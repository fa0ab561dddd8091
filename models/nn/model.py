"""A decoder trunk with one head: what a task trains."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.nn.cache import Cache
from models.nn.head import Loss
from models.nn.unpadded import without_padding


class Head(Protocol):
    """Turns hidden states into logits, or with labels straight into the loss."""

    def __call__(
        self,
        hidden_BTD: Tensor,
        segment_ids_BT: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Any: ...


class DecoderModel(nn.Module):
    """Trunk under `trunk_name` and head under `head_name`: parameter names as in Hugging Face.

    Trunk and head run inside one `forward`, so that the hooks of FSDP2, DDP and DeepSpeed on this
    root module cover both, tied weights included.
    """

    def __init__(
        self, trunk: nn.Module, head: nn.Module, *, trunk_name: str, head_name: str
    ) -> None:
        super().__init__()
        self.trunk_name, self.head_name = trunk_name, head_name
        self.skips_padding = False
        """Whether the trunk computes no padding of batches that are text alone."""
        self.compute_dtype = torch.float32
        """What it is computed in where padding is skipped: weights that are sharded do not say."""
        self.add_module(trunk_name, trunk)
        self.add_module(head_name, head)

    @property
    def trunk(self) -> nn.Module:
        return self.get_submodule(self.trunk_name)

    @property
    def head(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        **inputs: Any,
    ) -> Tensor | Loss:
        """Return the Loss against `labels`, or without labels the logits.

        input_ids, position_ids and segment_ids are (B, T) int64. `labels` and logits are the
        head's; `scale` (0-dim) multiplies the objective of backward, and nothing that is logged.
        `logits_to_keep` above 0: the head sees so many last positions alone (logits of 8k x 128k in
        fp32 would take 4 GB). `inputs` go to the trunk: images, or an encoder's states.
        """
        if cache is not None:
            inputs["cache"] = cache
        hidden_BTD = self.hidden_states(input_ids, position_ids, segment_ids, **inputs)
        if logits_to_keep:
            hidden_BTD = hidden_BTD[:, -logits_to_keep:]
            segment_ids = segment_ids[:, -logits_to_keep:]
        result: Tensor | Loss = self.head(hidden_BTD, segment_ids, labels, scale)
        return result

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, **inputs: Any
    ) -> Tensor:
        """Return the trunk's (B, T, D) hidden states of (B, T) ids."""
        if self.skips_padding and not inputs:
            text = (input_ids, position_ids, segment_ids)
            return without_padding(self.trunk, *text, dtype=self.compute_dtype)
        result: Tensor = self.trunk(input_ids, position_ids, segment_ids, **inputs)
        return result
