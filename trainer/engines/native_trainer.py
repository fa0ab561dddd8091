"""One `train_step` over a laid-out model: passes, counts, the norm, the update."""

import torch
from torch import Tensor, nn

from models.nn.cache import Cache
from models.nn.head import Loss
from models.nn.vision_text import VisionTextTrunk, trains_on_images
from trainer.batch import Batch
from trainer.engines.counting import count_step
from trainer.engines.micro_batches import prepared
from trainer.engines.passes import Passes, PlainPasses, cache_for
from trainer.engines.update import Update
from trainer.mesh import Mesh
from trainer.parallel.fully_sharded import gather_once, let_go
from trainer.pieces import Piece
from trainer.protocols import StepResult


class NativeTrainer:
    """Owns the model, its passes and its update; see the Engine protocol."""

    def __init__(
        self,
        parts: list[nn.Module],
        passes: Passes,
        mesh: Mesh,
        device: torch.device,
        update: Update,
        *,
        is_narrow: bool,
    ) -> None:
        """`is_narrow`: FSDP2 gathers weights in another dtype than gradients are kept in."""
        self.parts, self.passes, self.mesh, self.device = parts, passes, mesh, device
        self.update = update
        for part in parts:
            part.train()  # all of it: `_set_training` looks at the top alone
        # DDP reduces what has a gradient in the last backward pass, and waits for all. FSDP2 widens
        # gradients behind each pass but the last, and then wants one dtype in a unit: so all of
        # them need one in the first pass too.
        places = (0, -1) if is_narrow else (-1,)
        self.with_image = places if any(map(trains_on_images, parts)) else ()
        for part in parts if is_narrow else ():
            if any(isinstance(module, VisionTextTrunk) for module in part.modules()):
                gather_once(part)

    def train_step(self, step: int, micro_batches: list[Batch], num_tokens: int) -> StepResult:
        micro_batches = prepared(micro_batches, self.device, self.with_image)
        counts, of_sources = count_step(micro_batches, num_tokens, self.mesh, self.device)
        # DDP and FSDP2 average gradients over ranks with different tokens; this makes them the mean
        # over all targets of the step.
        scale = self.passes.averaged_over / counts[0].clamp(min=1).double()
        self._set_training(True)
        sums = self.passes.train(step, micro_batches, scale)
        loss_sum, by_source = sums[0], torch.stack((sums[1:], of_sources))
        gradients = self.update.gradients()
        grad_norm = self.update.grad_norm(gradients)
        verdict = self.update.guard.judge(loss_sum, counts[0], grad_norm)
        lr = self.update.apply(step, gradients, grad_norm, verdict)
        return StepResult(
            loss_sum, *counts, grad_norm, verdict.skipped, lr, verdict.flags, by_source
        )

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Loss:
        self._set_training(False)
        return self.passes.loss(batch.to(self.device))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        self._set_training(False)
        length = batch.input_ids.shape[1]
        batch = batch.padded(-length % self.mesh.row_multiple).to(self.device)
        return self.passes.logits(batch)[:, :length]

    def new_cache(self) -> Cache | None:
        return cache_for(self.parts[0], self.mesh)

    @torch.no_grad()
    def next_logits(self, batch: Batch, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.logits(batch)[:, -1]
        assert isinstance(self.passes, PlainPasses), "stages keep no cache"
        self._set_training(False)
        return self.passes.next_logits(batch.to(self.device), cache)

    def _set_training(self, mode: bool) -> None:
        for part in self.parts:
            if part.training != mode:  # to tell 400 modules what they know takes a millisecond
                part.train(mode)

    def weights(self) -> dict[str, Piece]:
        return self.update.pieces

    def optimizer_state(self) -> dict[str, Piece]:
        return self.update.state()

    @property
    def writes(self) -> bool:
        return self.mesh.is_first_copy

    def loaded(self) -> None:
        for part in self.parts:
            let_go(part)
        self.update.loaded()

    def close(self) -> None:
        torch.compiler.reset()  # graphs, where blocks were compiled
