"""What the operations of a step compute and move, read off the calls themselves."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmm_)
UNCOUNTED = {aten.addmm_: aten.addmm}  # the registry knows it by its other name


@dataclass(frozen=True)
class Product:
    """One kind of product of matrices: shapes, strides and dtype of its two factors."""

    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        *batch, rows, inner = self.left[0]
        return 2 * (batch[0] if batch else 1) * rows * inner * self.right[0][-1]


@dataclass
class Traffic(TorchDispatchMode):
    """Counts while it is active."""

    flops: int = 0
    num_bytes: int = 0
    """Inputs and results of every operation but views: what unfused operations move."""
    calls: int = 0
    trained: int = 0
    """Numbers that AdamW updates."""
    products: Counter[Product] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in given}
        is_view = not func._schema.is_mutable and all(
            x.untyped_storage()._cdata in known for x in made
        )
        if not (is_view and made):
            self.calls += 1
            self.num_bytes += sum(x.numel() * x.element_size() for x in (*given, *made))
        count = flop_registry.get(UNCOUNTED.get(packet, packet))
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        if packet is aten._fused_adamw_:
            self.trained += sum(x.numel() for x in args[0])
        if packet in PRODUCTS:
            left, right = given[-2:]
            self.products[
                Product(
                    (tuple(left.shape), tuple(left.stride())),
                    (tuple(right.shape), tuple(right.stride())),
                    left.dtype,
                )
            ] += 1
        return result
