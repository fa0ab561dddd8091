"""A vocabulary in two parts: a large one that may be frozen, and additional rows that train."""

import torch
from torch import Tensor, nn

from models.nn.head import LMHead
from models.nn.init import Init


class DecoupledEmbedding(nn.Embedding):
    """Ids below `num_embeddings` are looked up in the main table, others in the additional one."""

    def __init__(
        self, vocab_size: int, additional_size: int, hidden_size: int, padding_idx: int | None
    ) -> None:
        """`padding_idx`: a row of the main table that starts at zero and stays there."""
        if padding_idx is not None and padding_idx >= vocab_size:
            raise ValueError(
                f"pad_token_id={padding_idx} lies outside vocab_size={vocab_size}; "
                "set it to a smaller id or null"
            )
        super().__init__(vocab_size, hidden_size, padding_idx=padding_idx)
        if additional_size:
            self.additional_embedding = nn.Embedding(additional_size, hidden_size)
        self.has_additional = additional_size > 0

    def initial(self, std: float) -> dict[str, Init]:
        width, row = self.embedding_dim, self.padding_idx
        zeros = None if row is None else (row * width, (row + 1) * width)
        inits = {"weight": Init(std=width**-0.5, zeros=zeros)}
        if self.has_additional:
            inits["additional_embedding.weight"] = Init(std=width**-0.5)
        return inits

    def forward(self, ids_BT: Tensor) -> Tensor:
        if not self.has_additional:
            return super().forward(ids_BT)
        is_additional = ids_BT >= self.num_embeddings
        main = super().forward(ids_BT.masked_fill(is_additional, 0))
        other = self.additional_embedding((ids_BT - self.num_embeddings).clamp(min=0))
        return torch.where(is_additional[..., None], other, main)


class DecoupledLMHead(LMHead):
    """Logits of the main vocabulary, then those of the additional rows (`additional_fc`)."""

    def __init__(
        self, hidden_size: int, vocab_size: int, additional_size: int, *, chunk_tokens: int
    ) -> None:
        super().__init__(hidden_size, vocab_size, chunk_tokens=chunk_tokens)
        if additional_size:
            self.additional_fc = nn.Linear(hidden_size, additional_size, bias=False)
        self.has_additional = additional_size > 0

    def initial(self, std: float) -> dict[str, Init]:
        if not self.has_additional:
            return {}
        return {"additional_fc.weight": Init(std=self.in_features**-0.5)}

    def weights(self) -> tuple[Tensor, ...]:
        main = super().weights()
        return (*main, self.additional_fc.weight) if self.has_additional else main
