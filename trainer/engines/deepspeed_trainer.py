"""One step through a DeepSpeed engine."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from models.nn.head import Loss
from trainer.batch import Batch
from trainer.engines.counting import count_step
from trainer.engines.deepspeed_state import ShardedState
from trainer.engines.passes import Keys, inputs
from trainer.engines.protocol import Surroundings
from trainer.pieces import Piece
from trainer.protocols import StepResult


class DeepSpeedTrainer:
    """The Engine protocol over what `initialize` returned."""

    def __init__(
        self,
        engine: Any,
        stage: int,
        lrs: list[float],
        masters: dict[str, Tensor],
        around: Surroundings,
    ) -> None:
        """`masters`: the fp32 values that the weights start from. Collective."""
        self.engine, self.stage, self.lrs = engine, stage, lrs
        self.mesh, self.device = around.mesh, around.device
        self.keys = Keys(around.seed, around.mesh)
        self.optim, self.schedule = around.optim, around.schedule
        self.max_steps = around.max_steps
        self.state = ShardedState(engine, stage, around.mesh, masters)
        if stage == 0:
            engine.enable_backward_allreduce = False  # done here, before the norm

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        micro_batches = [batch.to(self.device) for batch in micro_batches]
        counts = count_step(micro_batches, num_tokens, self.mesh, self.device)
        scale = self.mesh.token_size / counts[0].clamp(min=1).double()
        self.engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches):
            self.keys.start(step, number)
            loss = self._loss(batch, scale)
            self.engine.backward(loss.objective, scale_wrt_gas=False)
            loss_sum += loss.sum
        if self.mesh.token_size > 1:
            dist.all_reduce(loss_sum, group=self.mesh.token_group)
        factor = self.schedule.factor(step, self.max_steps)
        for group, lr in zip(self.state.base.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        norm = self._plain_norm() if self.stage == 0 else None
        skipped = norm is not None and not bool(norm.isfinite())
        if skipped:
            self.engine.zero_grad()
        else:
            self.engine.step()
        if norm is None:
            norm = self._reported_norm()
            skipped = bool(self.engine.optimizer.overflow)
        return StepResult(
            loss_sum, counts[0], counts[1], norm, torch.tensor(skipped), self.optim.lr * factor
        )

    def _loss(self, batch: Batch, scale: Tensor) -> Loss:
        return cast(Loss, self.engine(*inputs(batch), batch.targets, scale, **batch.images))

    def _plain_norm(self) -> Tensor:
        """Return the norm at stage 0, where DeepSpeed reports none in fp32."""
        self.engine.buffered_allreduce_fallback()
        gradients = [p.grad for p in self.state.trained.values() if p.grad is not None]
        squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients]
        return torch.stack(squares).double().sum().sqrt()

    def _reported_norm(self) -> Tensor:
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float(norm), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Loss:
        self.engine.eval()
        return self._loss(batch.to(self.device), torch.ones((), device=self.device))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        self.engine.eval()
        batch = batch.to(self.device)
        return cast(Tensor, self.engine(*inputs(batch), **batch.images))

    def weights(self) -> dict[str, Piece]:
        return self.state.weights()

    def optimizer_state(self) -> dict[str, Piece]:
        return self.state.optimizer_state()

    @property
    def writes(self) -> bool:
        return True  # rows are shared out over all ranks, none twice

    def loaded(self) -> None:
        self.state.take_over()
