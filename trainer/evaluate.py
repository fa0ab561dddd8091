"""Evaluation: the sum of losses over the sum of targets, whatever the batches and ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.by_source import by_source
from trainer.data.eval_loader import EvalLoader
from trainer.data.examples import Labels
from trainer.mesh import Mesh
from trainer.protocols import Engine
from trainer.tasks.protocol import Task, Totals


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates the held-out data, or the sample of it that its loader reads."""

    loader: EvalLoader
    task: Task
    labels: Labels | None
    mesh: Mesh
    device: torch.device

    def evaluate(
        self, engine: Engine, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return loss and the task's metrics, and the loss of each source where there are several.

        `on_batch` is called before each batch, as often on every rank, and may raise.
        Collective: every rank must call this.
        """
        sums = {source: [(0.0, 0.0)] for source in range(len(self.loader.rows.counts))}
        numbers, answers = self._judged(engine, on_batch)
        for source, nll_sum, count in numbers:
            sums[int(source)].append((nll_sum, count))
        # Rounded once, whatever the order: the number of ranks leaves no trace.
        of_all = [pair for pairs in sums.values() for pair in pairs]
        nll_sum, num_targets = (math.fsum(each) for each in zip(*of_all, strict=True))
        totals = Totals(
            nll_sum=nll_sum, num_targets=int(num_targets),
            num_bytes=self.loader.num_bytes, answers=answers, labels=self.labels,
        )  # fmt: skip
        return {
            "loss": totals.loss,
            "num_targets": totals.num_targets,
            **self.loader.extent,
            **self.task.eval_metrics(totals),
            **self._by_source(list(sums.values())),
        }

    def _judged(
        self, engine: Engine, on_batch: Callable[[], None]
    ) -> tuple[list[list[float]], np.ndarray | None]:
        """Return source, sum of losses and number of targets of every batch of all ranks, and all
        answers."""
        numbers = [torch.zeros(3, dtype=torch.float64, device=self.device)]
        answers: list[Tensor] = []
        for place, (source, batch) in enumerate(self.loader.batches()):
            on_batch()
            number = place * self.mesh.dp_size + self.mesh.dp_rank
            judged = self.task.judge(engine, batch, number, self.labels)
            one = torch.stack(
                [torch.full_like(judged.nll_sum, source), judged.nll_sum, judged.num_targets]
            ).double()
            if judged.answers is not None:
                # Context-parallel ranks all judge the same whole rows: the first counts them.
                is_first = self.mesh.rank("cp") == 0
                one[1:] *= is_first
                answers.append(judged.answers[: len(judged.answers) * is_first])
            numbers.append(one)
        found: list[list[float]] = self.mesh.in_order(torch.stack(numbers)).tolist()
        return found, self._of_all(answers) if answers else None

    def _of_all(self, answers: list[Tensor]) -> np.ndarray:
        """Return the answers of all ranks in an order that does not depend on their number."""
        of_ranks = self.mesh.of_any_length(torch.cat(answers))
        of_all = np.concatenate([own.cpu().numpy() for own in of_ranks])
        return of_all[np.argsort(of_all[:, 0], kind="stable")]

    def _by_source(self, pairs: list[list[tuple[float, float]]]) -> dict[str, float | int]:
        """`pairs`: losses and targets of each source, batch by batch."""
        store = self.loader.rows.store
        if not store.num_sources:
            return {}
        sums = [[math.fsum(each) for each in zip(*own, strict=True)] for own in pairs]
        return by_source([part.source for part in store.parts], list(zip(*sums, strict=True)))
