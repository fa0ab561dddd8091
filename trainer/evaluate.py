"""Evaluation: the sum of losses over the sum of targets, whatever the batches and ranks."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.loader import EvalLoader
from trainer.mesh import Mesh
from trainer.protocols import Engine
from trainer.tasks.protocol import Task


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates all rows of the held-out data."""

    loader: EvalLoader
    task: Task
    mesh: Mesh
    device: torch.device

    def evaluate(self, engine: Engine) -> dict[str, Any]:
        """Return loss and the task's metrics. Collective: every rank must call this."""
        numbers = [torch.zeros(2, dtype=torch.float64, device=self.device)]
        for batch in self.loader.batches():
            loss = engine.eval_step(batch)
            numbers.append(torch.stack([loss.sum.double(), loss.num_targets.double()]))
        of_all = self.mesh.in_order(torch.stack(numbers)).T.tolist()
        # Rounded once, whatever the order: the number of ranks leaves no trace.
        nll_sum, num_targets = map(math.fsum, of_all)
        return {
            "loss": nll_sum / num_targets if num_targets else float("nan"),
            "num_targets": int(num_targets),
            **self.task.eval_metrics(nll_sum, int(num_targets), self.loader.rows.store.num_bytes),
        }
