"""Which weights of a model are matrices of its blocks, and which matrices lie in one weight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layout import HeadRows, Layout
from models.lora import AdaptedLinear
from trainer.parallel.data_parallel import named_blocks
from trainer.pieces import is_vector


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Matrices in the rows of one weight: those of each head side by side, then shared ones."""

    heads: int = 1
    parts: int = 1
    shared: int = 0
    """Rows behind those of all heads."""
    shared_parts: int = 1

    def split(self, whole: Tensor) -> list[Tensor]:
        """Return the matrices of a whole weight."""
        count, width = whole.shape[0] - self.shared, whole.shape[1]
        by_head = whole[:count].view(self.heads, self.parts, -1, width)
        parts = [part.reshape(-1, width) for part in by_head.unbind(1)]
        return parts + (list(whole[count:].chunk(self.shared_parts)) if self.shared else [])

    def join(self, matrices: list[Tensor]) -> Tensor:
        """Return the weight of the matrices that `split` gave."""
        width = matrices[0].shape[1]
        by_head = [part.view(self.heads, -1, width) for part in matrices[: self.parts]]
        heads = torch.stack(by_head, dim=1).reshape(-1, width)
        return torch.cat([heads, *matrices[self.parts :]])


def block_matrices(model: nn.Module, layout: Layout) -> dict[str, Stacked]:
    """Return the weights of linears in the planned model's blocks that train as they are.

    A factor of an adapter is no matrix of the model: it is left out.
    """
    found = {}
    for prefix, block in named_blocks(model, layout):
        for path, module in block.named_modules():
            for own, linear in module.named_children():
                if not isinstance(linear, nn.Linear) or isinstance(module, AdaptedLinear):
                    continue
                name = ".".join(filter(None, (prefix, path, own, "weight")))
                weight = getattr(linear, "weight", None)
                if isinstance(weight, nn.Parameter) and _is_matrix(weight):
                    heads: dict[str, HeadRows] = getattr(module, "head_rows", {})
                    found[name] = _stacked(heads.get(own, HeadRows(unit=1)), len(weight))
    return found


def _is_matrix(weight: nn.Parameter) -> bool:
    return weight.requires_grad and weight.ndim == 2 and not is_vector(tuple(weight.shape))


def _stacked(rows: HeadRows, count: int) -> Stacked:
    if rows.parts == rows.shared_parts == 1:
        return Stacked()
    return Stacked(
        heads=(count - rows.shared) // rows.unit, parts=rows.parts, shared=rows.shared,
        shared_parts=rows.shared_parts,
    )  # fmt: skip
