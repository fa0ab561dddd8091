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
        """Return loss and the task's metrics, and the loss of each source where there are several.

        Collective: every rank must call this.
        """
        sums = {source: [(0.0, 0.0)] for source in range(len(self.loader.rows.counts))}
        for source, nll_sum, count in self._numbers(engine):
            sums[int(source)].append((nll_sum, count))
        # Rounded once, whatever the order: the number of ranks leaves no trace.
        of_all = [pair for pairs in sums.values() for pair in pairs]
        nll_sum, num_targets = (math.fsum(each) for each in zip(*of_all, strict=True))
        return {
            "loss": _mean(of_all),
            "num_targets": int(num_targets),
            **self.task.eval_metrics(nll_sum, int(num_targets), self.loader.rows.store.num_bytes),
            **self._by_source({source: _mean(pairs) for source, pairs in sums.items()}),
        }

    def _numbers(self, engine: Engine) -> list[list[float]]:
        """Return source, sum of losses and number of targets of every batch of all ranks."""
        numbers = [torch.zeros(3, dtype=torch.float64, device=self.device)]
        for source, batch in self.loader.batches():
            loss = engine.eval_step(batch)
            place = torch.full_like(loss.num_targets, source)
            numbers.append(torch.stack([place.double(), loss.sum.double(), loss.num_targets]))
        found: list[list[float]] = self.mesh.in_order(torch.stack(numbers)).tolist()
        return found

    def _by_source(self, losses: dict[int, float]) -> dict[str, float]:
        parts = self.loader.rows.store.parts
        if len(parts) == 1:
            return {}
        return {f"loss/{parts[source].source}": loss for source, loss in losses.items()}


def _mean(pairs: list[tuple[float, float]]) -> float:
    """Return the sum of all losses over the sum of all targets."""
    total, count = (math.fsum(each) for each in zip(*pairs, strict=True))
    return total / count if count else float("nan")
