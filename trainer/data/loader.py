"""Which rows each rank trains on at each step: a pure function of (step, rank), stateless."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import count
from typing import Any

import xxhash

from trainer.batch import Batch
from trainer.data.mixture import Mixture
from trainer.data.prefetch import Ahead
from trainer.data.row_filling import Rows
from trainer.data.sample_order import SampleOrder

VERSION = 1  # of the order: raise it when the same state would give other batches


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
    """Shares of the samples that come from each source, now."""
    past: Mixture | None = None
    """The sources and shares of the run so far; None: these, from its beginning."""
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
        is_text = batch.segment_ids > 0
        if self.rows.num_virtual:
            is_text &= batch.position_ids >= self.rows.num_virtual
        return int(is_text.sum())

    def first_sample(self, step: int) -> int:
        """Return the global sample that step number `step` (from 0) begins with."""
        anchor_step, anchor_sample = self.anchor
        return anchor_sample + (step - anchor_step) * self.global_samples

    @cached_property
    def mixture(self) -> Mixture:
        """The sources and shares of the whole run."""
        return self.past or self._begun()

    @cached_property
    def order(self) -> SampleOrder:
        numbers = tuple(map(self.mixture.names.index, self._sources[0]))
        return SampleOrder(counts=tuple(self.rows.counts), numbers=numbers, eras=self.mixture.eras)

    @property
    def _sources(self) -> tuple[list[str], list[str]]:
        """Names and fingerprints of the sources that are there."""
        store = self.rows.store
        return [part.source for part in store.parts], store.part_fingerprints

    def _begun(self) -> Mixture:
        return Mixture.first(*self._sources, self.weights, self.seed)

    def state(self, step: int) -> dict[str, Any]:
        """Return what says where the data stands after `step` steps: no world size in it."""
        done = [int(epoch) for epoch in self.epochs(step).values()]
        return {
            "version": VERSION,
            "fingerprint": self.rows.store.fingerprint,
            "seed": self.seed,
            "schedule": {
                f"global_{self.rows.unit}": self.global_samples,
                "row_tokens": self.rows.row_tokens,
            },
            **({} if self.mixture.is_plain else {"mix": self.mixture.state()}),
            "global_sample": self.first_sample(step),
            **({"passed_over": list(map(list, self.passed_over))} if self.passed_over else {}),
            "epoch": min(done),
        }

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each source was gone through after `step` steps."""
        names = (part.source for part in self.rows.store.parts)
        return dict(zip(names, self.order.epochs(self.first_sample(step)), strict=True))

    def position(self, step: int) -> str:
        """Return where the data stands after `step` steps, for people: how often all was read."""
        each = (f"{name} {done:.3f}".lstrip() for name, done in self.epochs(step).items())
        return f"{', '.join(each)} epochs"

    def resumed(self, step: int, state: dict[str, Any]) -> "StepLoader":
        """Return the loader that goes on after `step` steps with the mixture of the checkpoint;
        ValueError where the data differs."""
        for key, mine in (("version", VERSION), ("seed", self.seed)):
            if state[key] != mine:
                raise ValueError(
                    f"the data's {key} is {mine}, the checkpoint was made with {state[key]}; "
                    "bring the old data and tokenizer back, or start anew with name=... or "
                    "resume=never"
                )
        loader = self.following(state)
        if self.past is not None and loader.mixture.goes_on_as(self.past):
            loader = self  # a rewind leaves the order of all samples as it is
        gaps = tuple((first, last) for first, last in state.get("passed_over", ()))
        return replace(loader, anchor=(step, state["global_sample"]), passed_over=gaps)

    def following(self, state: dict[str, Any]) -> "StepLoader":
        """Return the loader with the mixtures of a checkpoint; ValueError where data differs."""
        return replace(self, past=self._mixture_in(state).knowing(*self._sources))

    def _mixture_in(self, state: dict[str, Any]) -> Mixture:
        if "mix" in state:
            return Mixture.load(state["mix"], self.seed)
        if "weights" not in state["schedule"]:
            return Mixture.first([""], [state["fingerprint"]], [Fraction(1)], self.seed)
        # Checkpoints of version 0.1 have a hash of the shares alone.
        weights = xxhash.xxh3_64_hexdigest("/".join(map(str, self.weights)).encode())
        found = (state["fingerprint"], state["schedule"]["weights"])
        if found != (self.rows.store.fingerprint, weights):
            raise ValueError(
                "the data's fingerprint or the shares of data.sources are others than this "
                "checkpoint was made with, which is too old to name them; bring the old ones "
                "back, or start anew with name=... or resume=never"
            )
        return self._begun()

    def mixed(self, *, may_change: bool) -> "StepLoader":
        """Return the loader that follows its own shares from its anchor on, whatever came before;
        ValueError where that is a change and may not be one."""
        shares = dict(zip(self._sources[0], self.weights, strict=True))
        now = self.mixture.changed(self.anchor[1], shares, is_allowed=may_change)
        return replace(self, past=now)

    def change_at(self, step: int) -> dict[str, Any] | None:
        """Return what the mixture becomes after `step` steps, and was; None: it stays."""
        first = self.first_sample(step)
        gap = self._gap_before(step) or (first, first)
        return self.mixture.change_in(gap[0], first)

    def passing_over(self, last: int) -> "StepLoader":
        """Return the loader that goes on at its anchor with global sample `last`.

        The order of all others stays what it was.
        """
        step, first = self.anchor
        gaps = self.passed_over
        if gaps and gaps[-1][1] == first:  # once more from the same step
            gaps, first = gaps[:-1], gaps[-1][0]
        return replace(self, anchor=(step, last), passed_over=(*gaps, (first, last)))
