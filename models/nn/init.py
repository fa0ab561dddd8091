"""Initial values keyed by parameter name: every parallel layout starts from the same weights."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCK = (
    1 << 20
)  # elements per independent random stream: a shard generates only the blocks it overlaps
_GROUP = 16  # torch makes normal numbers by so many: how many follow does not change those before


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


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a parameter starts: normal numbers of `std` around `mean`, or even ones in a range."""

    std: float = 0.0
    mean: float = 0.0
    bound: float = 0.0
    """Numbers spread evenly over [-bound, bound]; 0: normal ones."""
    zeros: tuple[int, int] | None = None
    """Range of the flattened parameter that starts at zero: the padding row of an embedding."""


def initializers(model: nn.Module, std: float) -> dict[str, Init]:
    """Map each parameter name to how it starts.

    Weights of linears, convolutions and embeddings get `std`, scales of norms one, biases zero. A
    module with a method `initial(std) -> dict[str, Init]` decides over what it names, for itself
    and below; the outermost module decides.
    """
    found: dict[str, Init] = {}
    for prefix, module in model.named_modules():
        initial: Any = getattr(module, "initial", None)
        for name, init in (initial(std) if initial else {}).items():
            found.setdefault(_join(prefix, name), init)
        for name, _ in module.named_parameters(recurse=False):
            found.setdefault(_join(prefix, name), _default(module, name, std))
    return found


def _default(module: nn.Module, name: str, std: float) -> Init:
    if name == "bias":
        return Init()
    is_matrix = isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
    return Init(std=std) if is_matrix else Init(mean=1.0)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def initial_values(name: str, init: Init, seed: int, start: int, stop: int) -> Tensor:
    """Return elements [start, stop) of the flattened parameter `name`, fp32 on the CPU.

    A pure function of its arguments: which rank asks, and for which range, changes nothing.
    """
    if not (init.std or init.bound) or stop == start:
        return torch.full((stop - start,), init.mean)
    first, last = start // BLOCK, (stop - 1) // BLOCK
    draw = _even if init.bound else torch.randn
    numbers = range(first, last + 1)
    blocks = torch.cat([_block(draw, name, seed, n, stop - n * BLOCK) for n in numbers])
    spread = init.bound or init.std
    values = blocks[start - first * BLOCK : stop - first * BLOCK] * spread + init.mean
    if init.zeros is not None:
        zero_start, zero_stop = (min(max(edge - start, 0), stop - start) for edge in init.zeros)
        values[zero_start:zero_stop] = 0.0
    return values


def _block(draw: Callable[..., Tensor], name: str, seed: int, number: int, needed: int) -> Tensor:
    """Return the numbers of a block, or its first ones: at least `needed` of them."""
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return draw(min(-(-needed // _GROUP) * _GROUP, BLOCK), generator=generator)


def _even(count: int, *, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * 2 - 1
