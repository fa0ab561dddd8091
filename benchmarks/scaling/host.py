"""How long a step keeps the host busy with our own Python, beside a bare loop over the same model.

The structure of Llama-3.1-8B (32 blocks, 291 weights) in small: products cost nothing, what is left
is Python and torch's dispatcher. FSDP2 over a process group that sends nothing (torch's "fake"), so
one process is one rank of 64. Three loops step in turn over the same `fully_shard`ed model:

    ours   the loop of `tessera train` as `construct.fit` builds it: loader, ledger, control word,
           progress, norm, guard, clip, update, and every tenth step a log point
    lean   forward, backward, norm, clip and fused AdamW by hand on the local parts of the weights
    usual  the same with clip_grad_norm_ and AdamW on the DTensors, as FSDP2's tutorial has it

Seconds are processor time of the whole process, its loader's thread included, with one thread for
kernels: no other job on the machine counts. Our own Python is ours less lean, pair by pair.
"""

import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.figure import Figure
from benchmarks.in_turn import spread
from benchmarks.starts import start_in
from launch.binding import bind_run
from launch.compose import compose
from trainer import construct
from trainer.batch import Batch
from trainer.callbacks.protocol import Callback, RunView
from trainer.distributed import Placement, Ranks
from trainer.parallel.pieces import local_tensors
from trainer.planning.apart import apart
from trainer.progress import Progress
from trainer.run import Run

RANKS, CURVE = 64, (2, 8, 64, 512)
LIMIT_MS = 3.0
ROUNDS, LOG_EVERY = 8, 10
ROW_TOKENS = 16
SMALL = (
    "model=llama_3_1_8b", "model.hidden_size=64", "model.intermediate_size=64", "model.head_dim=16",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.vocab_size=512",
    "tokenizer=byte", "precision=bf16", "mesh=fsdp", "data=text", f"data.row_tokens={ROW_TOKENS}",
    "data.micro_rows=1", "data.eval_fraction=0", "eval_every=null", "save_every=null",
    "max_steps=1000000", f"log_every={LOG_EVERY}",
)  # fmt: skip


@dataclass(kw_only=True)
class Seconds:
    """Of every step, one after the other; each tenth of ours logs."""

    ours: list[float] = field(default_factory=list)
    lean: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)

    @property
    def own(self) -> list[float]:
        """What is our own Python: all of ours, less what the lean loop takes beside it."""
        return [ours - lean for ours, lean in zip(self.ours, self.lean, strict=True)]


def typical(seconds: list[float]) -> list[float]:
    """Return the median of each of ten steps in a row: their mean holds a tenth of a log point."""
    return [median(seconds[place::LOG_EVERY]) for place in range(LOG_EVERY)]


class PretendedRanks(Ranks):
    """Ranks of which this process is the first and only one: no message is sent."""

    def __init__(self, world_size: int) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.placement, self.device = Placement(world_size=world_size), torch.device("cpu")
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        self.control_group = dist.new_group()


class EnoughError(Exception):
    """All steps were taken."""


class Observer(Callback):
    """Lets the bare loops step behind each step of ours, and keeps the time of all of them."""

    def __init__(self, rounds: int) -> None:
        self.seconds, self.rounds = Seconds(), rounds

    def build(self) -> "Observer":
        return self

    def on_start(self, view: RunView, progress: Progress) -> None:
        engine: Any = view.engine.at(1)._now  # type: ignore[attr-defined]
        clock, step = _clock(self.seconds, self.rounds, Bare(engine)), engine.train_step
        next(clock)

        def train_step(number: int, batches: list[Batch], num_tokens: int) -> Any:
            result = step(number, batches, num_tokens)
            clock.send(batches[0])
            return result

        engine.train_step = train_step


class Bare:
    """Hand-written steps over the model of an engine."""

    def __init__(self, engine: Any) -> None:
        (self.model,) = engine.parts
        self.weights = list(self.model.parameters())
        self.local: list[Tensor] = [nn.Parameter(w) for w in local_tensors(self.weights)]
        self.on_local = torch.optim.AdamW(self.local, lr=1e-4, fused=True)
        self.on_sharded = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)

    def lean(self, batch: Batch) -> None:
        self._backward(batch)
        gradients = local_tensors(cast(Tensor, weight.grad) for weight in self.weights)
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(square)
        torch._foreach_mul_(gradients, (1.0 / (square.sqrt() + 1e-6)).clamp(max=1.0))
        for weight, gradient in zip(self.local, gradients, strict=True):
            weight.grad = gradient
        self.on_local.step()
        self.on_local.zero_grad()
        self.on_sharded.zero_grad()

    def usual(self, batch: Batch) -> None:
        self._backward(batch)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.on_sharded.step()
        self.on_sharded.zero_grad()

    def _backward(self, batch: Batch) -> None:
        scale = torch.full((), 1.0 / ROW_TOKENS, dtype=torch.float64)
        loss = self.model(*batch.text, batch.targets, scale)
        loss.objective.backward()
        dist.all_reduce(loss.sum)


def _clock(seconds: Seconds, rounds: int, bare: Bare) -> Generator[None, Batch]:
    """Be sent the batch at the end of each step of ours; the first round warms up."""
    batch = yield
    for number in range((1 + rounds) * LOG_EVERY):
        lean, usual = _timed(bare.lean, batch), _timed(bare.usual, batch)
        start = process_time()
        batch = yield
        ours = process_time() - start
        if number >= LOG_EVERY:
            seconds.lean.append(lean)
            seconds.usual.append(usual)
            seconds.ours.append(ours)
    raise EnoughError


def _timed(step: Callable[[Batch], None], batch: Batch) -> float:
    start = process_time()
    step(batch)
    return process_time() - start


def small_run(folder: Path, world_size: int) -> Run:
    """Return the run of the small model on a text in `folder`."""
    text = folder / "text.txt"
    text.write_text("What is left of a step when products cost nothing? " * 2_000)
    words = [*SMALL, f"data.path={text}", f"data.cache={folder}", f"data.global_rows={world_size}"]
    tree = compose(words).tree | {"name": "host", "runs": str(folder)}
    run: Run = bind_run(tree)
    return run


def measure(world_size: int, rounds: int = ROUNDS) -> Seconds:
    """Return what steps of rank 0 of `world_size` take; in a process of its own: see `apart`."""
    torch.set_num_threads(1)
    observer = Observer(rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = replace(small_run(folder, world_size), callbacks={"observer": observer})
        start = start_in(folder / "run", Placement(world_size=world_size))
        attempt = start.locate(run.num_steps)
        try:
            # As `fit`, which would connect the ranks. No lock: nothing is saved.
            construct._train(run, start, PretendedRanks(world_size), attempt, None)
        except EnoughError:
            return observer.seconds
    raise AssertionError("the run ended before all steps were measured")


def figures() -> list[Figure]:
    """Measure all numbers of ranks; only 64 has a target."""
    found = {ranks: apart(measure, ranks) for ranks in CURVE}
    return [figure for ranks, seconds in found.items() for figure in _of(ranks, seconds)]


def _of(ranks: int, seconds: Seconds) -> list[Figure]:
    what = f"structure of Llama-3.1-8B, rank 0 of {ranks}"
    own, ours, usual = (
        [1000 * each for each in typical(side)]
        for side in (seconds.own, seconds.ours, seconds.usual)
    )
    return [
        Figure(
            name=f"our own Python in a step, ms ({what})", ours=spread(own), theirs=None,
            target=f"< {LIMIT_MS:g} ms", limit=LIMIT_MS, value=fmean(own), is_upper=True,
        ),
        Figure(
            name=f"host time of a whole step, ms, beside the usual FSDP2 loop ({what})",
            ours=spread(ours), theirs=spread(usual), target="<= 1.03x", limit=1.03,
            value=fmean(ours) / fmean(usual), is_upper=True,
        ),
    ]  # fmt: skip
