"""A linear in two steps: a product that ranks may share out, then what is applied once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

Reduce = Callable[[Tensor], Tensor]


def _whole(x: Tensor) -> Tensor:
    return x


class SummedLinear(nn.Linear):
    """Takes a linear's weights over. The names say how parameters lie, for whoever cuts them."""

    output_rows: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Parameters with one row for each output feature."""
    input_columns: ClassVar[tuple[str, ...]] = ("weight",)
    """Parameters with one column for each input feature."""
    after_sum: ClassVar[tuple[str, ...]] = ("bias",)
    """Parameters that `finish` uses; all others are the product's."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.reduce: Reduce = _whole
        """Adds up the products of ranks that hold different input features."""
        self.all_reduce: Reduce = _whole
        """The same of numbers that belong to no token."""

    is_plain = False
    """True: the linear alone, without what a subclass adds."""

    def forward(self, x: Tensor) -> Tensor:
        if self.is_plain:
            return SummedLinear.finish(self, self.reduce(SummedLinear.product(self, x)))
        return self.finish(self.reduce(self.product(x)))

    def product(self, x: Tensor) -> Tensor:
        """Return what the input features that are here add to the output; linear in `x`."""
        return self.times_weight(x)

    def times_weight(self, x: Tensor) -> Tensor:
        """Return W x, however W is kept."""
        return F.linear(x, self.weight)

    def finish(self, total: Tensor) -> Tensor:
        """Return the output of the whole product."""
        return total if self.bias is None else total + self.bias


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Compute without what is added to linears, and without dropout."""
    linears = [module for module in model.modules() if isinstance(module, SummedLinear)]
    was_training = model.training
    model.eval()
    for linear in linears:
        linear.is_plain = True
    try:
        yield
    finally:
        for linear in linears:
            linear.is_plain = False
        model.train(was_training)
