"""A decoder trunk with its language-model head: what a causal-LM task trains."""

from typing import overload

from torch import Tensor, nn

from models.nn.head import LMHead, Loss


class CausalLM(nn.Module):
    """Trunk under `trunk_name` and head under `lm_head`: parameter names as in Hugging Face.

    Trunk and head run inside one `forward`, so that the hooks of FSDP2, DDP and DeepSpeed on this
    root module cover both, tied weights included.
    """

    def __init__(self, trunk_name: str, trunk: nn.Module, head: LMHead) -> None:
        super().__init__()
        self.trunk_name = trunk_name
        self.add_module(trunk_name, trunk)
        self.lm_head = head

    @overload
    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor,
        scale: Tensor,
    ) -> Loss: ...
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | Loss:
        """Return the Loss against `labels`, or without labels the (B, T, V) logits.

        All inputs but `scale` (0-dim) are (B, T) int64. `labels` are shifted already. `scale`
        multiplies the objective of backward, and nothing that is logged.
        """
        hidden_BTD = getattr(self, self.trunk_name)(input_ids, position_ids, segment_ids)
        if labels is None or scale is None:
            return self.lm_head(hidden_BTD)
        return self.lm_head.loss(hidden_BTD, labels, scale)
