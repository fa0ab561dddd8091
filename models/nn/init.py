"""Initial values keyed by parameter name: every parallel layout starts from the same weights."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCK = (
    1 << 20
)  # elements per independent random stream: a shard generates only the blocks it overlaps


class SkipInit(TorchFunctionMode):
    """Build modules without drawing numbers: values come by name later.

    On the meta device the drawing costs 0.6 s all the same, for it imports torch's compiler.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def initial_stds(model: nn.Module, std: float) -> dict[str, float | None]:
    """Map each parameter name to the standard deviation of its normal distribution.

    Weights of linears and embeddings get `std`, biases 0.0 (zeros); None means "at its identity":
    ones, the scale of a norm.
    """
    return {name: rule for module_rules in _rules(model, std) for name, rule in module_rules}


def _rules(model: nn.Module, std: float) -> Iterator[list[tuple[str, float | None]]]:
    for prefix, module in model.named_modules():
        is_matrix = isinstance(module, nn.Linear | nn.Embedding)
        for name, _ in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            yield [(path, (std if name == "weight" else 0.0) if is_matrix else None)]


def initial_values(name: str, std: float | None, seed: int, start: int, stop: int) -> Tensor:
    """Return elements [start, stop) of the flattened parameter `name`, fp32 on the CPU.

    A pure function of its arguments: which rank asks, and for which range, changes nothing.
    """
    if std is None:
        return torch.ones(stop - start)
    if std == 0.0 or stop == start:
        return torch.zeros(stop - start)
    first, last = start // BLOCK, (stop - 1) // BLOCK
    blocks = torch.cat([_normal_block(name, seed, number) for number in range(first, last + 1)])
    return blocks[start - first * BLOCK : stop - first * BLOCK] * std


def _normal_block(name: str, seed: int, number: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(BLOCK, generator=generator)
