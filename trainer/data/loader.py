"""Which rows each rank trains on at each step: a pure function of (step, rank), stateless."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import count
from typing import Any, Protocol

import numpy as np
import xxhash

from trainer.batch import Batch
from trainer.data.prefetch import Ahead
from trainer.data.sample_order import SampleOrder
from trainer.data.tokens import TokenStore

VERSION = 1  # of the order: raise it when the same state would give other batches
EVAL_BLOCK = 512  # samples that are dealt together in an evaluation


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of one rank."""

    micro_batches: list[Batch]
    ranges: list[tuple[int, int]]
    """Global sample numbers [first, last) that this rank trains on: what the ledger records."""
    num_tokens: int
    """Tokens of this rank's rows, without padding and virtual ones."""
    passed_over: tuple[int, int] | None = None
    """Global samples [first, last) between the step before and this one: nobody trains on them."""

    @property
    def provenance(self) -> list[str]:
        """Where each row comes from."""
        return [source for batch in self.micro_batches for source in batch.provenance]


Locate = Callable[[np.ndarray], list[int]]
"""Returns which row or document each global sample is."""
Dealt = Iterable[tuple[Batch, list[tuple[int, int]]]]
"""A rank's micro-batches, each with the ranges [first, last) of samples that it holds. Those with
images are made one by one: of an evaluation's block they would fill the memory."""


class Rows(Protocol):
    """Rows of a fixed length that samples fill: one each, or several documents in one."""

    store: TokenStore
    row_tokens: int
    unit: str
    """What a sample is, in the plural: `rows` or `documents`."""
    num_virtual: int
    """Tokens before each document that are no text."""

    @property
    def counts(self) -> list[int]:
        """How many samples each source has."""
        ...

    def share(self, samples: range, *, micro_rows: int, rank: int, num_ranks: int) -> list[range]:
        """Return what is known of one rank's share before anything is read."""
        ...

    def deal(
        self, samples: range, locate: Locate, *, micro_rows: int, rank: int, num_ranks: int
    ) -> Dealt:
        """Return one rank's share of some samples; every rank gets as many micro-batches."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepLoader:
    """Yields whole steps of this rank.

    Step s (from 0) holds G = global_samples samples: [s*G, (s+1)*G) in a run whose G never changed.
    They fill rows, which are cut into micro-batches of micro_rows; micro-batch number t*w + r goes
    to rank r of w as its t-th. Which row or document a sample is (SampleOrder) is the same for
    every world size.
    """

    rows: Rows
    seed: int
    weights: tuple[Fraction, ...] = (Fraction(1),)
    """Shares of the samples that come from each source."""
    global_samples: int
    micro_rows: int
    rank: int
    num_ranks: int
    anchor: tuple[int, int] = (0, 0)
    """A step, and the global sample that it begins with."""
    passed_over: tuple[tuple[int, int], ...] = ()
    """Global samples [first, last) that the run left out on the way to the anchor."""

    def steps(self, first: int) -> Ahead[Step]:
        """Yield the steps from number `first` (0 is the run's first) without end, read ahead."""
        return Ahead(self.step(number) for number in count(first))

    def samples(self, number: int) -> range:
        """Return the samples of step `number` (from 0), over all ranks."""
        first = self.first_sample(number)
        return range(first, first + self.global_samples)

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Return the samples [first, last) of this rank in a step, before anything is read."""
        shared = self.rows.share(
            self.samples(number),
            micro_rows=self.micro_rows, rank=self.rank, num_ranks=self.num_ranks,
        )  # fmt: skip
        return [(part.start, part.stop) for part in shared]

    def step(self, number: int) -> Step:
        dealt = list(
            self.rows.deal(
                self.samples(number), self.order.locate,
                micro_rows=self.micro_rows, rank=self.rank, num_ranks=self.num_ranks,
            )
        )  # fmt: skip
        return Step(
            micro_batches=[batch for batch, _ in dealt],
            ranges=[one for _, ranges in dealt for one in ranges],
            num_tokens=sum(self._num_tokens(batch) for batch, _ in dealt),
            passed_over=self._gap_before(number),
        )

    def _gap_before(self, number: int) -> tuple[int, int] | None:
        first = self.first_sample(number)
        return next((gap for gap in self.passed_over if gap[1] == first), None)

    def provenance(self, number: int) -> list[str]:
        """Return where the rows of step `number` (from 0) come from, over all ranks."""
        return replace(self, rank=0, num_ranks=1).step(number).provenance

    def _num_tokens(self, batch: Batch) -> int:
        is_text = (batch.segment_ids > 0) & (batch.position_ids >= self.rows.num_virtual)
        return int(is_text.sum())

    def first_sample(self, step: int) -> int:
        """Return the global sample that step number `step` (from 0) begins with."""
        anchor_step, anchor_sample = self.anchor
        return anchor_sample + (step - anchor_step) * self.global_samples

    @cached_property
    def order(self) -> SampleOrder:
        return SampleOrder(counts=tuple(self.rows.counts), weights=self.weights, seed=self.seed)

    def state(self, step: int) -> dict[str, Any]:
        """Return what says where the data stands after `step` steps: no world size in it."""
        sample = self.first_sample(step)
        done = [int(epoch) for epoch in self.epochs(step).values()]
        # A hash, like the fingerprint: the state does not grow with the number of sources.
        weights = "/".join(map(str, self.weights))
        mix = {"weights": xxhash.xxh3_64_hexdigest(weights.encode())} if self.is_mixed else {}
        return {
            "version": VERSION,
            "fingerprint": self.rows.store.fingerprint,
            "seed": self.seed,
            "schedule": {
                f"global_{self.rows.unit}": self.global_samples,
                "row_tokens": self.rows.row_tokens,
                **mix,
            },
            "global_sample": sample,
            **({"passed_over": list(map(list, self.passed_over))} if self.passed_over else {}),
            "epoch": min(done),
        }

    @property
    def is_mixed(self) -> bool:
        return len(self.weights) > 1

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each source was gone through after `step` steps."""
        names = (part.source for part in self.rows.store.parts)
        return dict(zip(names, self.order.epochs(self.first_sample(step)), strict=True))

    def position(self, step: int) -> str:
        """Return where the data stands after `step` steps, for people: how often all was read."""
        each = (f"{name} {done:.3f}".lstrip() for name, done in self.epochs(step).items())
        return f"{', '.join(each)} epochs"

    def resumed(self, step: int, state: dict[str, Any]) -> "StepLoader":
        """Return the loader that goes on after `step` steps; ValueError where the data differs."""
        mine = self.state(step)
        for key in ("version", "fingerprint", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the data's {key} is {mine[key]}, the checkpoint was made with {state[key]}; "
                    "bring the old data and tokenizer back, or start anew with name=... or "
                    "resume=never"
                )
        if state["schedule"].get("weights") != mine["schedule"].get("weights"):
            raise ValueError(
                "data.sources have other weights than the checkpoint was made with, so their order "
                "is another one; bring the old ones back, or start anew with name=... or "
                "resume=never"
            )
        gaps = tuple((first, last) for first, last in state.get("passed_over", ()))
        return replace(self, anchor=(step, state["global_sample"]), passed_over=gaps)

    def passing_over(self, last: int) -> "StepLoader":
        """Return the loader that goes on at its anchor with global sample `last`.

        The order of all others stays what it was.
        """
        step, first = self.anchor
        gaps = self.passed_over
        if gaps and gaps[-1][1] == first:  # once more from the same step
            gaps, first = gaps[:-1], gaps[-1][0]
        return replace(self, anchor=(step, last), passed_over=(*gaps, (first, last)))


@dataclass(frozen=True, kw_only=True)
class EvalLoader:
    """Yields every sample of a store exactly once over all ranks, equally many batches on each."""

    rows: Rows
    micro_rows: int
    rank: int
    num_ranks: int

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield each batch with the number of the source that it is from."""
        block = max(EVAL_BLOCK, self.num_ranks * self.micro_rows)
        first = 0
        for source, size in enumerate(self.rows.counts):
            for start in range(first, first + size, block):
                samples = range(start, min(start + block, first + size))
                dealt = self.rows.deal(
                    samples, np.ndarray.tolist,
                    micro_rows=self.micro_rows, rank=self.rank, num_ranks=self.num_ranks,
                )  # fmt: skip
                yield from ((source, batch) for batch, _ in dealt)
            first += size
