"""Which rows each rank trains on at each step: a pure function of (step, rank), stateless."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from trainer.batch import Batch
from trainer.data.order import permute, permute_all, round_keys
from trainer.data.prefetch import ahead
from trainer.data.rows import PackedRows

VERSION = 1  # of the order: raise it when the same state would give other batches


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of one rank."""

    micro_batches: list[Batch]
    ranges: list[tuple[int, int]]
    """Global sample numbers [first, last) of each micro-batch: what the ledger records."""
    num_tokens: int
    """Tokens of this rank's rows, padding left out."""

    @property
    def provenance(self) -> list[str]:
        """Where each row comes from."""
        return [source for batch in self.micro_batches for source in batch.provenance]


@dataclass(frozen=True, kw_only=True)
class StepLoader:
    """Yields whole steps of this rank.

    Step s (from 0) holds G = global_rows global samples: [s*G, (s+1)*G) in a run whose G never
    changed. They are cut into micro-batches of micro_rows; micro-batch number t*w + r goes to rank
    r of w as its t-th. A sample's row is permute(sample mod rows, key(seed, epoch)): the same for
    every world size.
    """

    rows: PackedRows
    seed: int
    global_rows: int
    micro_rows: int
    rank: int
    num_ranks: int
    anchor: tuple[int, int] = (0, 0)
    """A step, and the global sample that it begins with."""

    def steps(self, first: int) -> Iterator[Step]:
        """Yield the steps from number `first` (0 is the run's first) without end, read ahead."""
        return ahead(self.step(number) for number in count(first))

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Return the global samples [first, last) of each micro-batch of step `number` (from 0)."""
        stride = self.num_ranks * self.micro_rows
        first = self.first_sample(number)
        starts = range(first + self.rank * self.micro_rows, first + self.global_rows, stride)
        return [(start, start + self.micro_rows) for start in starts]

    def step(self, number: int) -> Step:
        ranges = self.ranges(number)
        rows = self.rows_of(np.array([n for r in ranges for n in range(*r)], np.int64))
        batches = [
            self.rows.batch(rows[place : place + self.micro_rows], self.micro_rows)
            for place in range(0, len(rows), self.micro_rows)
        ]
        num_tokens = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
        return Step(micro_batches=batches, ranges=ranges, num_tokens=num_tokens)

    def first_sample(self, step: int) -> int:
        """Return the global sample that step number `step` (from 0) begins with."""
        anchor_step, anchor_sample = self.anchor
        return anchor_sample + (step - anchor_step) * self.global_rows

    def row_of(self, sample: int) -> int:
        """Return the row that stands at place `sample` of the run."""
        epoch, index = divmod(sample, self.rows.num_rows)
        return permute(index, self.rows.num_rows, round_keys("rows", self.seed, epoch))

    def rows_of(self, samples: np.ndarray) -> list[int]:
        """Return `row_of` of all samples of a step."""
        epochs, indices = np.divmod(samples, self.rows.num_rows)
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            keys = round_keys("rows", self.seed, epoch)
            is_here = epochs == epoch
            rows[is_here] = permute_all(indices[is_here], self.rows.num_rows, keys)
        found: list[int] = rows.tolist()
        return found

    def state(self, step: int) -> dict[str, Any]:
        """Return what says where the data stands after `step` steps: no world size in it."""
        sample = self.first_sample(step)
        return {
            "version": VERSION,
            "fingerprint": self.rows.store.fingerprint,
            "seed": self.seed,
            "schedule": {"global_rows": self.global_rows, "row_tokens": self.rows.row_tokens},
            "global_sample": sample,
            "epoch": sample // self.rows.num_rows,
        }

    def position(self, step: int) -> str:
        """Return where the data stands after `step` steps, for people: epoch and its share done."""
        return f"{self.first_sample(step) / self.rows.num_rows:.3f} epochs"

    def resumed(self, step: int, state: dict[str, Any]) -> "StepLoader":
        """Return the loader that goes on after `step` steps; ValueError where the data differs."""
        mine = self.state(step)
        for key in ("version", "fingerprint", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the data's {key} is {mine[key]}, the checkpoint was made with {state[key]}; "
                    "bring the old data back, or start anew with name=... or resume=never"
                )
        return replace(self, anchor=(step, state["global_sample"]))


@dataclass(frozen=True, kw_only=True)
class EvalLoader:
    """Yields every row of a store exactly once over all ranks, equally many batches on each."""

    rows: PackedRows
    micro_rows: int
    rank: int
    num_ranks: int

    def batches(self) -> Iterator[Batch]:
        stride = self.num_ranks * self.micro_rows
        for start in range(0, self.rows.num_rows, stride):
            first = min(start + self.rank * self.micro_rows, self.rows.num_rows)
            last = min(first + self.micro_rows, self.rows.num_rows)
            yield self.rows.batch(list(range(first, last)), self.micro_rows)
