"""One step through a DeepSpeed engine."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.nn.cache import Cache
from models.nn.head import Loss
from models.nn.vision_text import trains_on_images
from trainer.batch import Batch
from trainer.engines.counting import count_step, loss_sums, no_loss
from trainer.engines.deepspeed_gradients import Gradients
from trainer.engines.deepspeed_state import ShardedState
from trainer.engines.micro_batches import prepared
from trainer.engines.passes import Keys, PlainPasses, cache_for
from trainer.engines.protocol import Surroundings
from trainer.mesh import Mesh
from trainer.pieces import Piece
from trainer.protocols import StepResult


class DeepSpeedTrainer:
    """The Engine protocol over what `initialize` returned."""

    def __init__(self, state: ShardedState, lrs: list[float], around: Surroundings) -> None:
        """`lrs`: of the optimizer's groups, before the schedule."""
        self.engine, self.stage, self.state, self.lrs = state.engine, state.stage, state, lrs
        self.mesh, self.device = around.mesh, around.device
        self.passes = _DeepSpeedPasses(self.engine, self.mesh, Keys(around.seed, self.mesh))
        self.optim, self.schedule = around.optim, around.schedule
        self.max_steps = around.max_steps
        self.gradients = Gradients(state, around.optim.max_grad_norm)
        self.guard = around.guard
        # Stage 3 and offload start to sum in the first backward pass: what has no gradient there is
        # added to that of the step before. What has none in the last one may not be taken over.
        self.with_image = (0, -1) if trains_on_images(self.engine.module) else ()
        if self.stage == 0:
            self.engine.enable_backward_allreduce = False  # done here, before the norm

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        micro_batches = prepared(micro_batches, self.device, self.with_image)
        counts, of_sources = count_step(micro_batches, num_tokens, self.mesh, self.device)
        scale = self.mesh.token_size / counts[0].clamp(min=1).double()
        self.engine.train()
        sums = self.passes.train(step, micro_batches, scale)
        by_source = torch.stack((sums[1:], of_sources))
        factor = self.schedule.factor(step, self.max_steps)
        for group, lr in zip(self.state.base.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor
        self.gradients.judge = partial(self.guard.judge, sums[0], counts[0])
        if self.stage == 0:
            self._step_plain()
        else:
            self.engine.step()
        lr, verdict = self.optim.lr * factor, self.gradients.verdict
        return StepResult(
            sums[0], *counts, self.gradients.norm, verdict.skipped, lr, verdict.flags, by_source
        )

    def _step_plain(self) -> None:
        """Take the step of stage 0, where DeepSpeed knows no norm."""
        self.engine.buffered_allreduce_fallback()
        limit = self.gradients.judged()
        if bool(self.gradients.verdict.skipped):  # sync: as DeepSpeed does for the other stages
            self.engine.zero_grad()
            return
        if limit is not None:
            coefficient = (limit / (self.gradients.norm + 1e-6)).clamp(max=1.0)
            for parameter in self.state.trained.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(coefficient)
        self.engine.step()

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Loss:
        self.engine.eval()
        return self.passes.loss(batch.to(self.device))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        self.engine.eval()
        length = batch.input_ids.shape[1]
        batch = batch.padded(-length % self.mesh.row_multiple).to(self.device)
        return self.passes.logits(batch)[:, :length]

    def new_cache(self) -> Cache | None:
        return cache_for(self.engine.module, self.mesh)

    @torch.no_grad()
    def next_logits(self, batch: Batch, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.logits(batch)[:, -1]
        self.engine.eval()
        return self.passes.next_logits(batch.to(self.device), cache)

    def weights(self) -> dict[str, Piece]:
        return self.state.weights()

    def optimizer_state(self) -> dict[str, Piece]:
        return self.state.optimizer_state()

    @property
    def writes(self) -> bool:
        return True  # rows are shared out over all ranks, none twice

    def loaded(self) -> None:
        self.state.take_over()

    def close(self) -> None:
        self.engine.destroy()


class _DeepSpeedPasses(PlainPasses):
    """Backward passes through DeepSpeed, which reduces gradients as its stage does."""

    def __init__(self, engine: Any, mesh: Mesh, keys: Keys) -> None:
        super().__init__(engine, mesh, keys, is_compiled=False)
        self.engine = engine

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        sums = no_loss(micro_batches[0], scale.device)
        for number, batch in enumerate(map(self._own, micro_batches)):
            self.keys.start(step, number)
            loss = self._loss(batch, scale)
            self.engine.backward(loss.objective, scale_wrt_gas=False)
            sums += loss_sums(loss, batch)
        return self.mesh.sum_over_tokens(sums)
