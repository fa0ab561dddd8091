"""Tensors without memory: what computes with numbers is only written down, integers are real."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.planning.live import Ledger, tensors_in

_aten = torch.ops.aten
# They change their arguments alone, whose shapes stay: nothing is to be found out.
_UPDATES = {_aten._fused_adamw_.default, _aten._fused_adam_.default, _aten._fused_sgd_.default}

_DEVICE, _META = torch.ops.prim.device.default, torch.device("meta")
_ANSWERS = {torch.bool: False, torch.int64: 1}
_BY_VALUE = {_aten.arange, _aten.full, _aten.scalar_tensor}
"""Take the dtype of their arguments, where none is given."""


class Pretend(TorchDispatchMode):
    """Runs what is about floating-point tensors on shapes alone.

    Ids, positions and segments are small and stay real: what is read off them on the host, as the
    lengths of documents, is there. A number that is asked of a pretended tensor is 1, a truth value
    false: nothing is skipped.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # half of all calls: no operation
            return _META if self.shapes.in_kernel_invocation else args[0].fake_device
        if any(is_wrapper(kind) for kind in types):
            return NotImplemented  # DTensor: what it does with its local part comes here
        result = self._result(func, args, kwargs or {})
        self.ledger.note(result)
        return result

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        is_pretended = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if is_pretended and func is _aten._local_scalar_dense.default:
            return _ANSWERS.get(tensors[0].dtype, 1.0)
        if func in _UPDATES:
            return None
        if func.name() == "c10d::recv_" and not is_pretended:
            tensors[0].fill_(1)  # of a message that nobody sent: a pipeline's stages vote yes
        is_new = not tensors or tensors[0].is_meta  # given memory, where `device` says so
        if is_pretended or (is_new and _is_of_numbers(func, args, kwargs)):
            with self.shapes:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def is_wrapper(kind: type) -> bool:
    """Whether tensors of this type only refer to the one that has the memory."""
    return issubclass(kind, Tensor) and kind.__name__ == "DTensor"


def _is_of_numbers(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what is made out of nothing holds floating-point numbers."""
    dtype = kwargs.get("dtype")
    if dtype is None and func.overloadpacket in _BY_VALUE:
        return any(isinstance(value, float) for value in args)
    return bool((dtype or torch.get_default_dtype()).is_floating_point)
