"""The end of a step: norm, clipping and the optimizer's update, on this rank's pieces."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.mesh import Mesh
from trainer.optim import OptimSpec
from trainer.parallel.pieces import global_square_sum, local_tensor, sum_shared
from trainer.parallel.pipeline import absent
from trainer.pieces import Piece
from trainer.schedule import Schedule


class Update:
    """Owns the optimizer, which sees plain tensors: the local part of each weight that trains.

    `parameters` are those that are here; `pieces` and `trained` name those of the whole model.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        pieces: dict[str, Piece],
        trained: set[str],
        *,
        mesh: Mesh,
        optim: OptimSpec,
        no_decay: set[str],
        schedule: Schedule,
        max_steps: int,
        device: torch.device,
    ) -> None:
        self.parameters, self.pieces, self.device = parameters, pieces, device
        self.is_first_holder, self.group = mesh.is_first_holder, mesh.copy_group()
        self.is_later_stage = mesh.rank("pp") > 0
        self.optim, self.schedule, self.max_steps = optim, schedule, max_steps
        here = trained & parameters.keys()
        self.trained = {name: piece for name, piece in pieces.items() if name in here}
        self.elsewhere = {name: p for name, p in pieces.items() if name in trained - here}
        # A pipeline stage may hold frozen layers alone; torch has no optimizer over nothing.
        nothing = {"": Piece.of(torch.zeros(0, device=device))}
        self.optimizer = optim.build(pieces=self.trained or nothing, no_decay=no_decay)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._create_state()

    def grad_norm(self) -> Tensor:
        """Return the norm of the whole gradient, before clipping. Collective."""
        gradients = [
            (self.pieces[name], parameter.grad)
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        ]
        self.sum_shared(gradients)
        return global_square_sum(gradients, self.group, self.device).sqrt()

    def sum_shared(self, gradients: list[tuple[Piece, Tensor]]) -> None:
        """Add up gradients of what several ranks hold and each saw a part of. Collective."""
        sum_shared(gradients)

    def apply(self, step: int, grad_norm: Tensor, skipped: Tensor) -> float:
        """Clip and update on the device; a skipped step changes no weight and no state.

        Return the learning rate.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.pieces[name].local.grad = local_tensor(parameter.grad)
        self._clip(grad_norm)
        factor = self.schedule.factor(step, self.max_steps)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        # The fused kernels leave weights and state as they are where found_inf is 1: no host sync.
        cast(Any, self.optimizer).found_inf = skipped.float()
        self.optimizer.step()
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.pieces[name].local.grad = None
        return self.optim.lr * factor

    def _clip(self, grad_norm: Tensor) -> None:
        """Scale gradients down to max_grad_norm, by the formula of torch's clip_grad_norm_."""
        gradients = [p.local.grad for p in self.trained.values() if p.local.grad is not None]
        if self.optim.max_grad_norm is not None and gradients:
            coefficient = (self.optim.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, coefficient)

    def _create_state(self) -> None:
        """Make every weight's state before the first save or load, by an update that is skipped."""
        _skip_a_step(self.optimizer, [piece.local for piece in self.trained.values()])

    def state(self) -> dict[str, Piece]:
        """Return this rank's pieces of the optimizer state, as `kind/parameter name`."""
        state = {}
        for name in self.pieces:
            if name in self.trained:
                piece = self.trained[name]
                for kind, value in self.optimizer.state[piece.local].items():
                    # Scalars (the step counters) are the same on every rank; the rest lies as the
                    # weight.
                    is_like_weight = value.shape == piece.local.shape
                    state[f"{kind}/{name}"] = (
                        piece.like(value)
                        if is_like_weight
                        else Piece.of(value, is_own=self._answers(piece))
                    )
            elif name in self.elsewhere:
                state |= self._absent_state(name)
        return state

    def _answers(self, piece: Piece) -> bool:
        """Whether this rank writes the scalars of a weight: of those that hold it, one does."""
        is_shared = any(axis.startswith("pp") for r in piece.rows for axis, _ in r.sum_over)
        return self.is_first_holder and not (is_shared and self.is_later_stage)

    def _absent_state(self, name: str) -> dict[str, Piece]:
        """Return the shapes of what another stage has: what this optimizer keeps for a weight."""
        piece = self.elsewhere[name]
        weight = torch.zeros(2, dtype=piece.local.dtype)
        optimizer = self.optim.build(pieces={"": Piece.of(weight)}, no_decay=set())
        _skip_a_step(optimizer, [weight])
        return {
            f"{kind}/{name}": piece.like(torch.empty_like(piece.local, dtype=value.dtype))
            if value.shape == weight.shape
            else absent(Piece.of(value))
            for kind, value in optimizer.state[weight].items()
        }


def _skip_a_step(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> None:
    """Make the state of every weight by an update that changes nothing."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
        cast(Any, optimizer).found_inf = torch.ones((), device=weight.device)
    if weights:
        optimizer.step()
    for weight in weights:
        weight.grad = None
