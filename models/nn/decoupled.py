"""A vocabulary in two parts: a large one that may be frozen, and additional rows that train."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.nn.decoder import ScaledEmbedding, scaled
from models.nn.head import LMHead
from models.nn.init import Init, SkipInit


class DecoupledEmbedding(nn.Embedding):
    """Ids below `num_embeddings` are looked up in the main table, others in the additional one."""

    scales_additional = True

    def __init__(
        self,
        vocab_size: int,
        additional_size: int,
        hidden_size: int,
        padding_idx: int | None,
        *,
        std: float | None = None,
        scale: float | None = None,
    ) -> None:
        """`padding_idx`: a row of the main table that starts at zero and stays there; `std`: of
        initial weights, None: the model's; `scale`: as of ScaledEmbedding, None: 1.
        """
        if padding_idx is not None and padding_idx >= vocab_size:
            raise ValueError(
                f"pad_token_id={padding_idx} lies outside vocab_size={vocab_size}; "
                "set it to a smaller id or null"
            )
        super().__init__(vocab_size, hidden_size, padding_idx=padding_idx)
        if additional_size:
            self.additional_embedding = nn.Embedding(additional_size, hidden_size)
        self.has_additional = additional_size > 0
        self.std, self.scale = std, scale

    def initial(self, std: float) -> dict[str, Init]:
        std = self.std or std
        width, row = self.embedding_dim, self.padding_idx
        zeros = None if row is None else (row * width, (row + 1) * width)
        inits = {"weight": Init(std=std, zeros=zeros)}
        if self.has_additional:
            inits["additional_embedding.weight"] = Init(std=std)
        return inits

    def forward(self, ids_BT: Tensor) -> Tensor:
        if not self.has_additional:
            return self._scaled(super().forward(ids_BT))
        is_additional = ids_BT >= self.num_embeddings
        main = self._scaled(super().forward(ids_BT.masked_fill(is_additional, 0)))
        other = self.additional_embedding((ids_BT - self.num_embeddings).clamp(min=0))
        if self.scales_additional:
            other = self._scaled(other)
        return torch.where(is_additional[..., None], other, main)

    def _scaled(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.scale is None else scaled(x_BTD, self.scale)


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


class NewEmbedding(DecoupledEmbedding):
    """Its additional rows are new to the model: no weights of its family hold them."""


class NewLMHead(DecoupledLMHead):
    """As NewEmbedding, for the head."""


Enlarged = TypeVar("Enlarged", bound=DecoupledEmbedding)


def enlarged(kind: type[Enlarged], old: nn.Embedding, count: int) -> Enlarged:
    """Return an embedding with the weight of `old` and `count` additional rows."""
    new = kind(
        old.num_embeddings, count, old.embedding_dim, old.padding_idx,
        std=getattr(old, "std", None), scale=getattr(old, "scale", None),
    ).to(old.weight.dtype)  # fmt: skip
    new.weight = old.weight
    return new


def add_rows(model: nn.Module, embedding: str, count: int) -> None:
    """Give a model's vocabulary `count` more rows, in place; what it has keeps its names.

    Where the head is tied, its new rows are those of the embedding. ValueError for an embedding or
    head that computes more than rows of a table.
    """
    old = model.get_submodule(embedding)
    if getattr(old, "has_additional", False):
        raise ValueError(
            "model.additional_tokens are rows of their own, and this model has additional rows "
            "already; set model.additional_vocab_size=0, or take model.additional_tokens out"
        )
    if type(old) not in (nn.Embedding, ScaledEmbedding, DecoupledEmbedding):
        raise ValueError(_refusal(embedding, old))
    assert isinstance(old, nn.Embedding)
    new = enlarged(NewEmbedding, old, count)
    model.set_submodule(embedding, new)
    if model.head_name == "lm_head":
        model.set_submodule("lm_head", _new_head(model.get_submodule("lm_head"), old, new))


def _new_head(old: nn.Module, embedding: nn.Embedding, new: NewEmbedding) -> NewLMHead:
    is_plain = isinstance(old, LMHead) or (type(old) is nn.Linear and old.bias is None)
    if not is_plain:
        raise ValueError(_refusal("lm_head", old))
    assert isinstance(old, nn.Linear)
    head = NewLMHead(
        old.in_features, old.out_features, new.additional_embedding.num_embeddings,
        chunk_tokens=getattr(old, "chunk_tokens", 1),
    ).to(old.weight.dtype)  # fmt: skip
    head.weight = old.weight
    if old.weight is embedding.weight:
        head.additional_fc.weight = new.additional_embedding.weight
    return head


def _refusal(name: str, module: nn.Module) -> str:
    return (
        f"model.additional_tokens cannot be put beside {name}, a {type(module).__name__} that "
        "computes in a way of its own; enlarge the model with transformers first"
    )


def new_rows(model: nn.Module) -> dict[str, str]:
    """Map each parameter of new rows to that of the rows in front of them."""
    return dict(_rows(model, NewEmbedding, NewLMHead))


def additional_rows(model: nn.Module) -> dict[str, str]:
    """As new_rows, also of the additional rows that belong to the model's family."""
    return dict(_rows(model, DecoupledEmbedding, DecoupledLMHead))


def _rows(
    model: nn.Module, embedding: type[nn.Module], head: type[nn.Module]
) -> Iterator[tuple[str, str]]:
    names = {name for name, _ in model.named_parameters()}  # a tied head's are the embedding's
    for name, module in model.named_modules():
        for kind, end in ((embedding, "additional_embedding"), (head, "additional_fc")):
            new = f"{name}.{end}.weight"
            if isinstance(module, kind) and new in names:
                yield new, f"{name}.weight"


@torch.no_grad()
def merge_rows(model: nn.Module) -> None:
    """Put new rows behind the others, in one matrix each of embedding and head, in place."""
    merged: dict[int, nn.Parameter] = {}  # by the rows in front: a tied head has the embedding's
    for name, old in list(model.named_modules()):
        if not isinstance(old, NewEmbedding | NewLMHead):
            continue
        rest = old.additional_embedding if isinstance(old, NewEmbedding) else old.additional_fc
        if id(old.weight) not in merged:
            whole = torch.cat((old.weight, rest.weight))
            merged[id(old.weight)] = nn.Parameter(whole, requires_grad=False)
        weight = merged[id(old.weight)]
        model.set_submodule(name, _plain(old, weight))


def _plain(old: NewEmbedding | NewLMHead, weight: nn.Parameter) -> nn.Module:
    rows, width = weight.shape
    new: DecoupledEmbedding | DecoupledLMHead
    with torch.device("meta"), SkipInit():
        if isinstance(old, NewEmbedding):
            new = DecoupledEmbedding(rows, 0, width, old.padding_idx, scale=old.scale)
        else:
            new = DecoupledLMHead(width, rows, 0, chunk_tokens=old.chunk_tokens)
    new.weight = weight
    return new
