"""The native engine: torch alone. One process, DDP or FSDP2 behind one `train_step`."""

import hashlib
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.layout import Layout
from models.nn.head import IGNORED, Loss
from trainer.batch import Batch
from trainer.mesh import Mesh
from trainer.optim import OptimSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.data_parallel import blocks, replicate, set_gradient_sync, shard
from trainer.parallel.pieces import (
    global_square_sum,
    local_tensor,
    named_pieces,
    unique_parameters,
)
from trainer.pieces import Piece
from trainer.precision import Precision
from trainer.protocols import StepResult
from trainer.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class NativeEngine:
    """Train with torch alone."""

    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
    )
    compile: bool = False
    """Compile each block (torch.compile, static shapes): faster steps after a slower first one."""

    def check(self) -> None:
        """Raise ValueError for what this machine cannot do."""
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if self.compile and not any(map(shutil.which, compilers)):
            raise ValueError(
                f"engine.compile=true needs a C++ compiler, found none ({', '.join(compilers)}); "
                "install one, or set engine.compile=false"
            )

    def lay_out(self, model: nn.Module, layout: Layout, mesh: Mesh, precision: Precision) -> None:
        """Prepare the meta model in place: recompute, compile, shard if the mesh has the axis."""
        self.activation_checkpointing.apply(blocks(model, layout))
        if self.compile:
            for block in blocks(model, layout):
                block.compile(dynamic=False)
        if mesh.dp_shard > 1:
            shard(model, layout, mesh, precision)

    def build(
        self,
        *,
        model: nn.Module,
        layout: Layout,
        mesh: Mesh,
        precision: Precision,
        device: torch.device,
        optim: OptimSpec,
        schedule: Schedule,
        seed: int,
        max_steps: int,
    ) -> "NativeTrainer":
        """Return the engine over a materialised model."""
        called = model if mesh.dp_shard > 1 else replicate(model, mesh, precision)
        return NativeTrainer(
            model, called, layout, mesh, device, optim, schedule, seed, max_steps, self.compile
        )


class NativeTrainer:
    """Owns the model, its wrapping and its optimizer; see the Engine protocol."""

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        layout: Layout,
        mesh: Mesh,
        device: torch.device,
        optim: OptimSpec,
        schedule: Schedule,
        seed: int,
        max_steps: int,
        is_compiled: bool,
    ) -> None:
        self.model, self.called, self.mesh, self.device = model, called, mesh, device
        self.optim, self.schedule, self.seed, self.max_steps = optim, schedule, seed, max_steps
        self.is_compiled = is_compiled
        self.parameters = dict(unique_parameters(model))
        self.pieces = named_pieces(self.parameters.items())
        no_decay = {f"{layout.embedding}.weight"}
        self.trained = {
            name: piece
            for name, piece in self.pieces.items()
            if self.parameters[name].requires_grad
        }
        self.optimizer = optim.build(pieces=self.trained, no_decay=no_decay)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._create_optimizer_state()

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        micro_batches = [batch.to(self.device) for batch in micro_batches]
        counts = self._count(micro_batches, num_tokens)
        # DDP and FSDP2 average gradients over dp; this makes them the mean over all targets of the
        # step.
        scale = self.mesh.dp_size / counts[0].clamp(min=1).double()
        loss_sum = self._accumulate_gradients(step, micro_batches, scale)
        self._all_reduce(loss_sum)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        grad_norm = global_square_sum(gradients).sqrt()
        skipped = ~(grad_norm.isfinite() & loss_sum.isfinite())
        lr = self._update(step, grad_norm, skipped)
        return StepResult(loss_sum, counts[0], counts[1], grad_norm, skipped, lr)

    def _count(self, micro_batches: list[Batch], num_tokens: int) -> Tensor:
        """Return (targets, tokens) of the step over all data ranks, before the first backward."""
        targets = [(batch.labels != IGNORED).sum() for batch in micro_batches]
        # full, not tensor: a fill on the device, where a copy from the host would wait.
        tokens = torch.full((), num_tokens, dtype=torch.int64, device=self.device)
        counts = torch.stack([torch.stack(targets).sum(), tokens])
        self._all_reduce(counts)
        return counts

    def _accumulate_gradients(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches):
            set_gradient_sync(self.called, number == len(micro_batches) - 1)
            # Keyed by the micro-batch's place in the global step: the same dropout on any world
            # size.
            leaf = number * self.mesh.dp_size + self.mesh.dp_rank
            torch.manual_seed(_key(self.seed, step, leaf))
            loss = self._loss(batch, scale)
            loss.objective.backward()
            loss_sum += loss.sum
        return loss_sum

    def _loss(self, batch: Batch, scale: Tensor) -> Loss:
        return cast(
            Loss,
            self.called(
                batch.input_ids, batch.position_ids, batch.segment_ids, batch.labels, scale
            ),
        )

    def _update(self, step: int, grad_norm: Tensor, skipped: Tensor) -> float:
        """Clip and update on the device; a skipped step changes no weight and no state."""
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
        if self.optim.max_grad_norm is not None:
            gradients = [p.local.grad for p in self.trained.values() if p.local.grad is not None]
            coefficient = (self.optim.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, coefficient)

    def _create_optimizer_state(self) -> None:
        """Make every weight's state before the first save or load, by an update that is skipped."""
        for piece in self.trained.values():
            piece.local.grad = torch.zeros_like(piece.local)
        cast(Any, self.optimizer).found_inf = torch.ones((), device=self.device)
        self.optimizer.step()
        for piece in self.trained.values():
            piece.local.grad = None

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Loss:
        self.model.eval()
        return self._loss(batch.to(self.device), torch.ones((), device=self.device))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        self.model.eval()
        batch = batch.to(self.device)
        inputs = (batch.input_ids, batch.position_ids, batch.segment_ids)
        # Generated text has another length at every step: no graph for each.
        with torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext():
            return cast(Tensor, self.called(*inputs))

    def weights(self) -> dict[str, Piece]:
        return self.pieces

    def optimizer_state(self) -> dict[str, Piece]:
        state = {}
        for name, piece in self.trained.items():
            for kind, value in self.optimizer.state[piece.local].items():
                # Scalars (the step counters) are the same on every rank; the rest lies as the
                # weight.
                is_like_weight = value.shape == piece.local.shape
                state[f"{kind}/{name}"] = (
                    Piece(local=value, shape=piece.shape, start=piece.start, stop=piece.stop)
                    if is_like_weight
                    else Piece(local=value, shape=tuple(value.shape), start=0, stop=value.numel())
                )
        return state

    def _all_reduce(self, tensor: Tensor) -> None:
        if self.mesh.dp_size > 1:
            dist.all_reduce(tensor, group=self.mesh.dp_group)


def _key(*parts: int) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
