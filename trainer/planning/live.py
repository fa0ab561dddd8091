"""Which tensors were alive when: every storage, from the operation that made it to its end."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

BUILD, FORWARD, BACKWARD, UPDATE = "build", "forward", "backward", "update"
GATHERED = "gathered"
"""Holds a storage whose size was changed: weights that FSDP2 gathers and lets go."""


@dataclass(slots=True)
class Block:
    """One storage at one size."""

    num_bytes: int
    shape: tuple[int, ...]
    """Of the tensor that it was made for."""
    phase: str
    """Of the step, when it was made."""
    born: int
    """In operations since the start."""
    died: int | None = None
    kind: str = ""
    """What it holds, where whoever made it says so; empty: what phase and shape say."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an argument or a result. torch's own walk took a tenth of a plan."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


class Ledger:
    """Writes down births and deaths of storages."""

    def __init__(self) -> None:
        self.now = 0
        self.starts = {BUILD: [0]}
        """At which operations each phase began."""
        self.blocks: list[Block] = []
        self._phase = BUILD
        self._alive = WeakIdKeyDictionary()  # storage -> its Block
        self._ends: list[weakref.ref[Any]] = []

    def enter(self, phase: str) -> None:
        """Say in which phase of a step what follows is."""
        if phase != self._phase:
            self._phase = phase
            self.starts.setdefault(phase, []).append(self.now)

    @property
    def phase(self) -> str:
        """Gradients are formed wherever a backward pass runs."""
        is_backward = torch._C._current_graph_task_id() != -1
        return BACKWARD if is_backward else self._phase

    def note(self, result: Any) -> None:
        """Write down what an operation made."""
        self.now += 1
        for tensor in tensors_in(result):
            if not tensor.is_meta:  # DeepSpeed keeps shapes so
                storage = tensor.untyped_storage()
                if storage not in self._alive:
                    self._begin(storage, storage.nbytes(), tuple(tensor.shape), "")

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor holds."""
        block = self._alive.get(tensor.untyped_storage())
        if block is not None:
            block.kind = kind

    def resized(self, storage: Any, num_bytes: int) -> None:
        """Write down that a storage has another size: FSDP2 lets go of gathered weights so."""
        self.now += 1
        old = self._alive.pop(storage, None)
        if old is not None:
            old.died = self.now
            old.kind = old.kind or GATHERED
        self._begin(storage, num_bytes, () if old is None else old.shape, GATHERED)

    def _begin(self, storage: Any, num_bytes: int, shape: tuple[int, ...], kind: str) -> None:
        block = Block(num_bytes, shape, self.phase, self.now, kind=kind)
        self.blocks.append(block)
        self._alive[storage] = block
        # Held here, or the callback would not come; one for each size that a storage had.
        self._ends.append(weakref.ref(storage, lambda _: self._end(block)))

    def _end(self, block: Block) -> None:
        if block.died is None:
            block.died = self.now

    @contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """Notice resized storages: no dispatched operation says so."""
        plain = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, num_bytes: int) -> Any:
            result = plain(storage, num_bytes)
            self.resized(storage, int(num_bytes))
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
