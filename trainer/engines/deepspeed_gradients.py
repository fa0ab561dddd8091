"""Gradients in a DeepSpeed engine: summed where tensors are split, their norm, and the verdict."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engines.deepspeed_state import ShardedState
from trainer.numerics.guard import Verdict
from trainer.parallel.pieces import sum_shared
from trainer.pieces import Piece

# What stages compute the norm by, inside the step.
_NORMS = {1: "scaled_global_norm", 2: "scaled_global_norm", 3: "_get_norm_groups"}


class Gradients:
    """Makes gradients those of whole tensors, tells their norm, and has the step judged by it."""

    norm: Tensor
    """Of the last step, before clipping."""
    verdict: Verdict
    judge: Callable[[Tensor], Verdict]
    """Says what is to be done with the step of this norm; set before each."""

    def __init__(self, state: ShardedState, max_grad_norm: float | None) -> None:
        self.max_grad_norm = max_grad_norm
        self.stage, self.mesh, self.device = state.stage, state.mesh, state.engine.device
        self.trained = [
            (parameter, state.pieces[name]) for name, parameter in state.trained.items()
        ]
        for parameter, piece in self.trained:
            if piece.is_shared:
                # Ahead of the hooks that reduce over data ranks, once for each backward pass.
                parameter.register_hook(partial(_summed, piece))
        if self.stage > 0:
            self._set_norm(state.engine.optimizer, _NORMS[self.stage])

    def _set_norm(self, optimizer: Any, method: str) -> None:
        """Let DeepSpeed clip by our norm, and skip what our verdict skips.

        A norm that is not finite is its sign for that, and its own look at each gradient, which
        sees no loss and no spike, is left out. Its own norm counts a
        parameter on every tensor-parallel rank or on the first alone. Key heads that some ranks
        repeat, and c_attn whose last rows are on all of them, are neither.
        """
        assert hasattr(optimizer, method), method

        def norm() -> Any:
            limit = self.judged()
            optimizer.clip_grad = limit or 0.0
            found = self.norm.to(optimizer.device)
            # sync: DeepSpeed decides on the host whether to step.
            found = found.new_tensor(torch.inf) if bool(self.verdict.skipped) else found
            return [found] if self.stage == 3 else found

        setattr(optimizer, method, norm)
        optimizer.check_grad_overflow = True  # else stages 1 and 2 use any norm in bf16
        optimizer.check_overflow = lambda **_: None

    def judged(self) -> float | None:
        """Find norm and verdict of the step; return what to clip to, None: nothing. Collective."""
        self.norm = self.square_sum().sqrt()
        self.verdict = self.judge(self.norm)
        limits = [self.max_grad_norm] if self.max_grad_norm is not None else []
        if self.verdict.limit is not None:
            limits.append(float(self.verdict.limit))  # sync: DeepSpeed takes a number
        return min(limits, default=None)

    def square_sum(self) -> Tensor:
        """Return the sum of squares over the whole tensors, each element once. Collective."""
        squares = [torch.zeros((), device=self.device)]
        for parameter, piece in self.trained:
            flat, start = _local(parameter, self.stage)
            for own in piece.own_elements(flat, start):
                norm = torch.linalg.vector_norm(own, dtype=torch.float32)
                squares.append(norm.square().to(self.device))  # offloaded ones are on the CPU
        total = torch.stack(squares).double().sum()
        # At stage 0 every data rank has all of them; else each has a part of its own.
        dist.all_reduce(total, group=self.mesh.group("tp") if self.stage == 0 else None)
        return total


def _summed(piece: Piece, gradient: Tensor) -> Tensor:
    """Return what all ranks that hold these rows found of their gradient. Collective."""
    total = gradient.clone()
    sum_shared([(piece, total)])
    return total


def _local(parameter: nn.Parameter, stage: int) -> tuple[Tensor, int]:
    """Return this rank's part of a gradient, flat, and where it starts in the flat parameter.

    As it is inside the step, reduced over data ranks.
    """
    inside: Any = parameter
    if stage == 0:
        found = parameter.grad
        return (torch.zeros(0) if found is None else found.flatten()), 0
    if stage == 3:
        found = inside._z3_optimizer.get_local_fp32_grad_for_param(parameter)
        return found, inside.ds_zero_partition_rank * len(found)
    if (part := inside._hp_mapping) is None:
        return torch.zeros(0), 0
    found = part.get_lp_grad_fragment(inside._index_in_param_group)
    return found.flatten(), part.lp_fragment_address.start
