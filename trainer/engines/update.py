"""The end of a step: norm, clipping and the optimizer's update, on this rank's pieces."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engines.host_copies import HostCopies
from trainer.mesh import Mesh
from trainer.numerics.guard import Guard, Verdict
from trainer.optim import Optimizer, OptimSpec
from trainer.optimizers.fused_step import FusedStep
from trainer.optimizers.place import Place
from trainer.optimizers.rules import Rules
from trainer.optimizers.states import make_state, state_piece
from trainer.parallel.pieces import global_square_sum, local_tensors, sum_shared
from trainer.parallel.pipeline import absent
from trainer.parallel.tree import row_square_sum
from trainer.pieces import Piece
from trainer.schedule import Schedule


class SquareSum(Protocol):
    """Adds up the squares of whole tensors, of which each rank has pieces."""

    def __call__(
        self,
        gradients: Iterable[tuple[Piece, Tensor]],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Sums:
    """In which order the end of a step adds up."""

    square_sum: SquareSum
    is_fused: bool
    """Whether the optimizer's fused kernels may be used."""


FAST = Sums(square_sum=global_square_sum, is_fused=True)
TOPOLOGY_FREE = Sums(square_sum=row_square_sum, is_fused=False)


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
        rules: Rules,
        place: Place,
        schedule: Schedule,
        max_steps: int,
        device: torch.device,
        sums: Sums,
        is_offloaded: bool,
        guard: Guard,
    ) -> None:
        """`sums`: in which order to add up. `is_offloaded`: the optimizer works on the host."""
        self.parameters, self.pieces, self.device, self.sums = parameters, pieces, device, sums
        self.guard = guard
        self.is_first_holder, self.group = mesh.is_first_holder, mesh.copy_group()
        self.is_later_stage = mesh.rank("pp") > 0
        self.optim, self.schedule, self.max_steps = optim, schedule, max_steps
        here = trained & parameters.keys()
        self.trained = {name: piece for name, piece in pieces.items() if name in here}
        self.trained_here = [(name, p) for name, p in parameters.items() if name in here]
        self.elsewhere = {name: p for name, p in pieces.items() if name in trained - here}
        self.host = HostCopies(self.trained) if is_offloaded else None
        self.updated = self.host.pieces if self.host else self.trained
        """What the optimizer sees and changes."""
        # A pipeline stage may hold frozen layers alone; torch has no optimizer over nothing.
        nothing = {"": Piece.of(torch.zeros(0, device=device))}
        self.rules, self.place = rules, place
        self.optimizer = optim.build(pieces=self.updated or nothing, rules=rules, place=place)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        # Before the first save or load.
        make_state(self.optimizer)
        self.fused: FusedStep | None = None
        if not sums.is_fused:
            _without_fused_kernels(self.optimizer)
        elif isinstance(self.optimizer, torch.optim.AdamW):
            self.fused = FusedStep(self.optimizer, self.updated or nothing)

    def gradients(self) -> dict[str, Tensor]:
        """Return the local parts of the gradients that there are."""
        found = {n: p.grad for n, p in self.trained_here if p.grad is not None}
        return dict(zip(found, local_tensors(found.values()), strict=True))

    def grad_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Return the norm of the whole gradient, before clipping. Collective."""
        found = [(self.pieces[name], gradient) for name, gradient in gradients.items()]
        self.sum_shared(found)
        return self.sums.square_sum(found, self.group, self.device).sqrt()

    def sum_shared(self, gradients: list[tuple[Piece, Tensor]]) -> None:
        """Add up gradients of what several ranks hold and each saw a part of. Collective."""
        sum_shared(gradients)

    def apply(
        self, step: int, gradients: dict[str, Tensor], grad_norm: Tensor, verdict: Verdict
    ) -> float:
        """Clip and update on the device; a skipped step changes no weight and no state.

        Return the learning rate.
        """
        self._clip(list(gradients.values()), grad_norm, verdict.limit)
        given = self._given(gradients)
        factor = self.schedule.factor(step, self.max_steps)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        self._step(given, verdict.skipped)
        for _, parameter in self.trained_here:
            parameter.grad = None
        return self.optim.lr * factor

    def _clip(self, gradients: list[Tensor], grad_norm: Tensor, limit: Tensor | None) -> None:
        """Scale gradients down to max_grad_norm and `limit`, by the formula of torch's
        clip_grad_norm_."""
        most: float | Tensor | None = self.optim.max_grad_norm
        if limit is not None:
            most = limit if most is None else limit.clamp(max=most)
        if most is not None and gradients:
            coefficient = (most / (grad_norm + 1e-6)).clamp(max=1.0)
            # CUDA multiplies many at once by a factor of their dtype only. Halves keep one of fp32.
            dtype = torch.promote_types(gradients[0].dtype, torch.float32)
            torch._foreach_mul_(gradients, coefficient.to(dtype))

    def _given(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients where the optimizer is."""
        if self.host is None:
            return gradients
        found = {name: self.host.gradient(name, one) for name, one in gradients.items()}
        self.host.wait()
        return found

    def _step(self, gradients: dict[str, Tensor], skipped: Tensor) -> None:
        """Update the weights, unless `skipped` says that nothing may change."""
        # Fused kernels leave weights and state as they are where found_inf is 1: no host sync.
        found_inf = skipped.float().cpu() if self.host else skipped.float()
        if self.fused:
            self.fused.step(gradients, found_inf)
        else:
            self._step_by_itself(gradients, found_inf)
        if self.host:
            self.host.push()

    def _step_by_itself(self, gradients: dict[str, Tensor], found_inf: Tensor) -> None:
        weights = [self.updated[name].local for name in gradients]
        for weight, gradient in zip(weights, gradients.values(), strict=True):
            weight.grad = gradient
        if self.sums.is_fused:
            cast(Any, self.optimizer).found_inf = found_inf
            self.optimizer.step()
        elif not bool(found_inf):  # sync: the plain kernels cannot skip by themselves
            self.optimizer.step()
        for weight in weights:
            weight.grad = None

    def loaded(self) -> None:
        """Take over weights that were written into the pieces."""
        if self.host:
            self.host.pull()

    def state(self) -> dict[str, Piece]:
        """Return this rank's pieces of the optimizer state, as `kind/parameter name`."""
        state = {}
        for name in self.pieces:
            if name in self.updated:
                piece = self.updated[name]
                is_own = self._answers(piece)
                for kind, value in self.optimizer.state[piece.local].items():
                    state[f"{kind}/{name}"] = state_piece(piece, value, is_own=is_own)
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
        alone = replace(self.place, mesh=None)
        optimizer = self.optim.build(pieces={name: piece}, rules=self.rules, place=alone)
        make_state(optimizer)
        state = {}
        for kind, value in optimizer.state[piece.local].items():
            found = state_piece(piece, value, is_own=False)
            state[f"{kind}/{name}"] = found if value.ndim else absent(found)
        return state


def _without_fused_kernels(optimizer: Optimizer) -> None:
    """From now on compute every element alike: fused kernels treat a tensor's last ones apart."""
    for group in optimizer.param_groups:
        group |= {"fused": False, "foreach": True}
    cast(Any, optimizer).found_inf = None
