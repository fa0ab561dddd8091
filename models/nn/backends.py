"""The attention back-ends by name, and which of them this machine has."""

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.nn.flash import flash_problem
from models.nn.segments import Segments

VARLEN_TORCH = "2.12"  # the first whose varlen_attn takes grouped heads


class Backend(Protocol):
    """One way to compute softmax(scale * Q K^T + mask) V."""

    def prepare(self, segments: Segments) -> Any:
        """Return what `attend` needs of the mask: computed once, shared by all layers."""
        ...

    def attend(
        self,
        query_BNTH: Tensor,
        key_BKSH: Tensor,
        value_BKSH: Tensor,
        mask: Any,
        *,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """Return the (B, N, T, H) mixture of values; K divides N."""
        ...


NAMES = ("auto", "eager", "sdpa", "flex", "varlen", "flash")
WITHOUT_DROPOUT = ("flex", "varlen")


def backend(name: str, *, dropout: float = 0.0) -> Backend:
    """Return the back-end called `name`, for attention with this dropout in training.

    Raises ValueError where it is unknown, not installed, or has no dropout and needs it.
    """
    check_name(name)
    if name == "auto":
        name = automatic(dropout)
    _check_installed(name)
    if dropout and name in WITHOUT_DROPOUT:
        raise ValueError(
            f"attn_implementation={name!r} has no dropout, and the model asks for {dropout}; "
            "set it to sdpa or auto, or the dropout to 0"
        )
    if name == "flex":
        from models.nn.flex import Flex

        return Flex()
    if name == "varlen":
        from models.nn.varlen import Varlen

        return Varlen()
    if name == "flash":
        from models.nn.flash import Flash

        return Flash()
    from models.nn.dense import Eager, Sdpa

    return Eager() if name == "eager" else Sdpa(has_dropout=dropout > 0)


def automatic(dropout: float = 0.0) -> str:
    """Return what `auto` picks: flex on CUDA without dropout, else sdpa, which takes any dtype.

    flex refuses float64 there: a run in it asks for sdpa.
    """
    return "flex" if torch.cuda.is_available() and not dropout else "sdpa"


def back_ends(model: nn.Module) -> set[str]:
    """Return the names of the back-ends that the model's modules use."""
    used = (getattr(module, "backend", None) for module in model.modules())
    return {type(backend).__name__.lower() for backend in used if backend is not None}


def check_name(name: str) -> None:
    """Raise ValueError where there is no back-end called `name`."""
    if name not in NAMES:
        raise ValueError(
            f"attn_implementation={name!r} is unknown; set it to one of {', '.join(NAMES)}"
        )


def _check_installed(name: str) -> None:
    problem = flash_problem() if name == "flash" else None
    if problem is not None:
        raise ValueError(problem)
    if name == "varlen" and torch.__version__ < VARLEN_TORCH:
        raise ValueError(
            f"attn_implementation='varlen' needs torch >= {VARLEN_TORCH}, and {torch.__version__} "
            "is installed; upgrade torch, or set it to flex or auto"
        )
    has_cuda = torch.cuda.is_available()
    if name in ("flash", "varlen") and not has_cuda:
        raise ValueError(
            f"attn_implementation={name!r} needs a CUDA GPU, and this machine has none; "
            "set it to sdpa or auto"
        )
    if name == "flex" and has_cuda and find_spec("triton") is None:
        raise ValueError(
            "attn_implementation='flex' needs the package triton on CUDA, which is not installed; "
            "run pip install triton, or set it to sdpa"
        )
