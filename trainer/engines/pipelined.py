"""Passes over a pipeline: torch's schedules, 1F1B or interleaved."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.nn.head import Loss
from trainer.batch import Batch
from trainer.engines.counting import loss_sums, no_loss
from trainer.engines.micro_batches import alike
from trainer.engines.passes import Keys
from trainer.parallel import context_parallel
from trainer.parallel.pipeline import Relay, Stages, num_scheduled

if TYPE_CHECKING:  # torch's schedules import its compiler: over a second, for a pipeline alone
    from torch.distributed.pipelining import PipelineStage


class PipelinedPasses:
    """Micro-batches follow each other through the stages.

    Source: Narayanan et al. 2021 (1F1B and interleaved schedules).
    """

    def __init__(
        self,
        stages: Stages,
        called: list[nn.Module],
        keys: Keys,
        *,
        device: torch.device,
        dtype: torch.dtype,
        token_shares: int,
    ) -> None:
        """`called`: what runs for each stage here. `token_shares`: by how many ranks tokens of the
        stream are divided (sequence parallelism)."""
        self.stages, self.called, self.keys, self.device = stages, called, keys, device
        self.dtype, self.token_shares = dtype, token_shares
        self.relay = Relay(stages, device, dtype)
        self.averaged_over = stages.mesh.token_size
        self.is_last = stages.indices[-1] == stages.num_stages - 1
        cp = stages.mesh.size("cp")
        self.cp = stages.mesh.group("cp") if cp > 1 else None
        self.schedule: Any = None
        self._num_scheduled = 0  # micro-batches of a step of `schedule`
        self._batches: list[Batch] = []
        self._sums: list[Tensor] = []  # of the micro-batches that the last stage is through with
        self._step, self._counts = 0, [0] * len(called)
        for place, part in enumerate(called):
            part.register_forward_pre_hook(lambda *_, place=place: self._start(place))
        if self.is_last:
            called[-1].register_forward_hook(self._keep_sum)

    def train(self, step: int, micro_batches: list[Batch], scale: Tensor) -> Tensor:
        if self.cp:
            micro_batches = [context_parallel.share(batch, self.cp) for batch in micro_batches]
        micro_batches = alike(self._filled_up(micro_batches))
        if len(micro_batches) != self._num_scheduled:
            self.schedule, self._num_scheduled = self._build(micro_batches), len(micro_batches)
        self._step, self._counts = step, [0] * len(self.called)
        self._batches, self._sums = micro_batches, []
        whole = _joined(micro_batches)
        ids = whole.pop("input_ids")
        first = (ids,) if self.stages.indices[0] == 0 else ()
        # One for each micro-batch: the schedule cuts every input into as many parts.
        whole["scale"] = scale.expand(len(micro_batches))
        target = whole["labels"] if self.is_last else None
        self.schedule.step(*first, target=target, return_outputs=False, **whole)
        self._step, self._batches = 0, []
        total = no_loss(micro_batches[0], self.device)
        for sums in self._sums:
            total += sums
        dist.all_reduce(total, group=self.stages.mesh.group("pp"))  # the others have none
        return self.stages.mesh.sum_over_tokens(total)

    def _filled_up(self, micro_batches: list[Batch]) -> list[Batch]:
        """Return at least as many micro-batches as a schedule needs, the last ones blank."""
        needed = num_scheduled(
            len(micro_batches), self.stages.mesh.size("pp"), len(self.stages.indices)
        )
        return micro_batches + [micro_batches[0].blank()] * (needed - len(micro_batches))

    def _start(self, place: int) -> None:
        """Seed the next micro-batch of a stage."""
        if self._step:
            self.keys.start(self._step, self._counts[place], self.stages.indices[place])
            self._counts[place] += 1

    def _build(self, micro_batches: list[Batch]) -> Any:
        """Make a schedule for this many micro-batches; its first step makes its buffers.

        torch's schedules take one number, and their stages hold buffers for all micro-batches: so
        one is kept, not one for each number. A step of another number than the one before it costs
        a round of small messages and a sync (.item() in torch's vote on static shapes).
        """
        from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

        stages: list[Any] = [
            self._stage(part, index, micro_batches[0], self._first_trained)
            for index, part in zip(self.stages.indices, self.called, strict=True)
        ]
        settings: dict[str, Any] = {
            "n_microbatches": len(micro_batches),
            "loss_fn": lambda objective, _: objective.sum(),
            "scale_grads": False,
        }
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, **settings)
        return Schedule1F1B(stages[0], **settings)

    def _stage(self, part: nn.Module, index: int, example: Batch, first: int) -> "PipelineStage":
        """`first`: the first stage that trains; what comes before it sends no gradient."""
        from torch.distributed.pipelining import PipelineStage

        shape = self._hidden_shape(example)
        entering, leaving = (
            torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=has_gradient)
            for has_gradient in (index > first, index >= first)
        )
        ids = torch.empty_like(example.input_ids, device="meta")
        wide = torch.promote_types(self.dtype, torch.float32)
        objective = torch.empty(1, dtype=wide, device="meta", requires_grad=True)
        is_last = index == self.stages.num_stages - 1
        return PipelineStage(
            part, index, self.stages.num_stages, self.device,
            input_args=entering if index else ids,
            output_args=objective if is_last else leaving,
            input_grads=entering.detach() if index > first else None,
            output_grads=leaving.detach() if index >= first and not is_last else None,
            group=self.stages.mesh.group("pp"),
        )  # fmt: skip

    @cached_property
    def _first_trained(self) -> int:
        trained = [
            index
            for index, part in zip(self.stages.indices, self.called, strict=True)
            if any(parameter.requires_grad for parameter in part.parameters())
        ]
        first = torch.tensor(min(trained, default=self.stages.num_stages), device=self.device)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self.stages.mesh.group("pp"))
        return int(first)

    def _hidden_shape(self, batch: Batch) -> tuple[int, ...]:
        rows, length = batch.input_ids.shape
        return rows, length // self.token_shares, self.stages.hidden_size

    def _keep_sum(self, _: nn.Module, __: Any, output: Any) -> Any:
        """In a training pass, take what is logged aside: a stage hands on what has a gradient."""
        if not self._step:
            return output
        self._sums.append(loss_sums(output, self._batches[len(self._sums)]))
        return output.objective

    def loss(self, batch: Batch) -> Loss:
        if self.cp:
            batch = context_parallel.share(batch, self.cp)
        scale = torch.ones((), device=self.device)
        loss = self._forward(batch, labels=batch.targets, scale=scale)
        numbers = torch.zeros(2, dtype=torch.float64, device=self.device)
        if loss is not None:
            numbers = torch.stack([loss.sum.double(), loss.num_targets.double()])
        total, count = self.relay.spread(numbers)
        return Loss(total, count.long(), total)

    def logits(self, batch: Batch) -> Tensor:
        if self.cp:
            batch = context_parallel.share(batch, self.cp)
        found = self._forward(batch, labels=batch.class_labels)
        shape = torch.zeros(3, dtype=torch.int64, device=self.device)
        if found is not None:
            shape = torch.tensor(found.shape, device=self.device)
        rows, length, width = self.relay.spread(shape).tolist()
        if found is None:
            found = torch.empty((rows, length, width), dtype=self.dtype, device=self.device)
        found = self.relay.spread(found.contiguous())
        if self.cp is None or batch.class_labels is not None:  # a text's answer is not cut
            return found
        return context_parallel.all_tokens(found, self.cp)

    def _forward(self, batch: Batch, **others: Any) -> Any:
        return self.relay.run(
            self.called, batch.input_ids, self._hidden_shape(batch),
            position_ids=batch.position_ids, segment_ids=batch.segment_ids, **others,
            **batch.images,
        )  # fmt: skip


def _joined(micro_batches: list[Batch]) -> dict[str, Any]:
    """Return the rows of all micro-batches: the schedule cuts them apart again."""
    several = [
        {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "segment_ids": batch.segment_ids,
            "labels": batch.targets,
            **batch.images,
        }
        for batch in micro_batches
    ]
    return {
        name: torch.cat([one[name] for one in several]) if isinstance(first, Tensor) else first
        for name, first in several[0].items()
    }
