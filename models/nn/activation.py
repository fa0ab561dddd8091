"""Activation functions by their Hugging Face names."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]

_TANH_GELU: Activation = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_new": _TANH_GELU,  # the same formula, written out in other libraries
    "relu": F.relu,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),  # of CLIP
}


def check_activation(key: str, name: str) -> None:
    """Raise ValueError where `name`, the value of config key `key`, is no known activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is unknown; set it to one of {', '.join(ACTIVATIONS)}")
