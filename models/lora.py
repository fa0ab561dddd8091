"""Adapters of linears: LoRA, rsLoRA, QLoRA, DoRA and IA3, under the names of peft's files.

The linear's own weights keep their names, so a model with adapters reads and starts as one without.
Source: Hu et al. 2022 (LoRA), Kalajdzievski 2023 (rsLoRA), Dettmers et al. 2023 (QLoRA, equation
5), Liu et al. 2024 (DoRA, section 4), Liu et al. 2022 (IA3, section 3.3).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.nn.init import Init, SkipInit
from models.nn.linear import SummedLinear
from models.nn.prompt import prompt_rows

MAGNITUDE = "lora_magnitude_vector"
Unpack = Callable[[], Tensor]
Pack = Callable[[Tensor, torch.dtype], Unpack]
"""Takes a weight, and the type to compute in; returns what gives it back, as near as it is kept."""


class AdaptedLinear(SummedLinear):
    """A linear with an adapter, which can be computed into its weights."""

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias) of the plain linear that computes the same, dropout aside."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return that linear."""
        weight, bias = self.folded()
        with torch.device("meta"), SkipInit():
            plain = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        return plain


class LoRALinear(AdaptedLinear):
    """y = W x + scale * B A dropout(x) + b, with A (R, in) and B (out, R)."""

    output_rows = (*AdaptedLinear.output_rows, "lora_B.weight")
    input_columns = (*AdaptedLinear.input_columns, "lora_A.weight")

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        is_zero: bool = True,
    ) -> None:
        """`is_zero`: B starts at zero, so that nothing changes; else at random, for tests."""
        super().__init__(linear)
        self.scale, self.dropout, self.is_zero = scale, dropout, is_zero
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        with SkipInit():
            self.lora_A = nn.Linear(self.in_features, rank, bias=False, **like)
            self.lora_B = nn.Linear(rank, self.out_features, bias=False, **like)

    def initial(self, std: float) -> dict[str, Init]:
        """A as peft: kaiming-uniform with a = sqrt(5), whose bound is 1 / sqrt(in)."""
        return {
            "lora_A.weight": Init(bound=self.in_features**-0.5),
            "lora_B.weight": Init(std=0.0 if self.is_zero else std),
        }

    def product(self, x: Tensor) -> Tensor:
        return self.times_weight(x) + self._low_rank(self._dropped(x))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _low_rank(self, x: Tensor) -> Tensor:
        result: Tensor = self.lora_B(self.lora_A(x)) * self.scale
        return result

    def _own_weight(self) -> Tensor:
        return self.weight

    def _sum(self) -> Tensor:
        return self._own_weight() + self.lora_B.weight @ self.lora_A.weight * self.scale

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return self._sum(), self.bias


class _UnpackedProduct(torch.autograd.Function):
    """W x, with W unpacked in each pass: autograd would keep every W until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Unpack) -> Tensor:
        ctx.unpack = unpack
        return F.linear(x, unpack())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.unpack(), None


class PackedLoRALinear(LoRALinear):
    """LoRA beside a frozen W that is kept in few bits.

    It is planned like any other, with a weight on the meta device; `hold` takes W itself.
    """

    unpack: Unpack

    def __init__(self, linear: nn.Linear, *, pack: Pack, **settings: Any) -> None:
        super().__init__(linear, **settings)
        self.pack = pack

    def hold(self, weight: Tensor) -> None:
        """Keep W (out, in), packed, on its device; the planned parameter is gone."""
        self.unpack = self.pack(weight, self.weight.dtype)
        self.register_parameter("weight", None)

    def times_weight(self, x: Tensor) -> Tensor:
        result: Tensor = _UnpackedProduct.apply(x, self.unpack)
        return result

    def _own_weight(self) -> Tensor:
        return self.unpack()


class DoRALinear(LoRALinear):
    """Each output row of W + scale * B A has length 1 times a trained magnitude.

    The length is a constant to the gradient (section 4.3); dropout acts on what differs from W.
    """

    output_rows = (*LoRALinear.output_rows, MAGNITUDE)

    def __init__(self, linear: nn.Linear, **settings: float) -> None:
        super().__init__(linear, **settings)  # type: ignore[arg-type]
        self.lora_magnitude_vector = nn.Parameter(linear.weight.new_empty(self.out_features))

    def initial(self, std: float) -> dict[str, Init]:
        """The magnitude starts as the length of W's rows: who knows W decides."""
        return super().initial(std) | {MAGNITUDE: Init(mean=1.0)}

    def product(self, x: Tensor) -> Tensor:
        own = F.linear(x, self.weight)
        dropped = self._dropped(x)
        changed = own if dropped is x else F.linear(dropped, self.weight)
        low_rank = self._low_rank(dropped)
        factor = self._factor()
        return own + (factor - 1) * changed + factor * low_rank

    def _factor(self) -> Tensor:
        with torch.no_grad():
            matrix = self._sum()
            wide = torch.promote_types(matrix.dtype, torch.float32)
            squares = self.all_reduce(matrix.to(wide).square().sum(1))
        return self.lora_magnitude_vector / squares.sqrt().to(matrix.dtype)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return self._factor()[:, None] * self._sum(), self.bias


class IA3Linear(AdaptedLinear):
    """y = l * (W x + b), with one factor for each output feature."""

    output_rows = (*AdaptedLinear.output_rows, "ia3_l")
    after_sum = (*AdaptedLinear.after_sum, "ia3_l")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.ia3_l = nn.Parameter(linear.weight.new_empty((self.out_features, 1)))

    def initial(self, _: float) -> dict[str, Init]:
        return {"ia3_l": Init(mean=1.0)}

    def finish(self, total: Tensor) -> Tensor:
        return super().finish(total) * self.ia3_l.flatten()

    def folded(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias * self.ia3_l.flatten()
        return self.weight * self.ia3_l, bias


class IA3InputLinear(AdaptedLinear):
    """y = W (l * x) + b, with one factor for each input feature: for a feed-forward layer's end."""

    input_columns = (*AdaptedLinear.input_columns, "ia3_l")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.ia3_l = nn.Parameter(linear.weight.new_empty((1, self.in_features)))

    def initial(self, _: float) -> dict[str, Init]:
        return {"ia3_l": Init(mean=1.0)}

    def product(self, x: Tensor) -> Tensor:
        return super().product(x * self.ia3_l.flatten())

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return self.weight * self.ia3_l, self.bias


def adapt(
    model: nn.Module, names: Iterable[str], make: Callable[[nn.Linear], AdaptedLinear]
) -> None:
    """Put an adapter on each named linear, in place."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        model.set_submodule(name, make(linear))


def packed_linears(model: nn.Module) -> dict[str, PackedLoRALinear]:
    """Return the linears whose own weights are kept in few bits, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters' own parameters, which no weights of the base hold."""
    linears = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
        for own, _ in module.named_parameters()
        if own not in SummedLinear.output_rows
    ]
    return linears + prompt_rows(model)


def merge(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Compute every adapter into plain weights, in place; return what `unmerge` puts back."""
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    for name, linear in adapted.items():
        model.set_submodule(name, linear.merged())
    return adapted


def unmerge(model: nn.Module, adapted: dict[str, AdaptedLinear]) -> None:
    """Put the adapters back: the same weights, bit for bit."""
    for name, linear in adapted.items():
        model.set_submodule(name, linear)
