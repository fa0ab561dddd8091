"""A step of a run once more, in this process: what each document cost, and whether it comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from trainer.adapters.contents import contents_of
from trainer.batch import Batch
from trainer.best import Best
from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.loading import restore
from trainer.construct import phased_engine
from trainer.data.examples import PREFERENCE, Labels
from trainer.data.loader import Step, StepLoader
from trainer.data.tokenizers import Tokenizer
from trainer.determinism import bits_of, fix_bits
from trainer.directory import CHECKPOINTS
from trainer.distributed import Placement, Ranks
from trainer.inspection.pieces import Piece, pieces_of
from trainer.ledger import read_lives, surviving
from trainer.numerics.guard import Guard
from trainer.numerics.rewinds import kept, read_rewinds
from trainer.phases import PhasedEngine
from trainer.progress import Progress
from trainer.resume import Place
from trainer.run import Run
from trainer.run_data import data_of
from trainer.settle import settle

TEXT_TOKENS = 64  # of a document, that are shown
# Of the loss, relative: what another order of additions makes of some steps of training.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-4}
TOLERANCE = 2e-2  # of all other precisions


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the ledgers of all ranks say about a step of the run as it is now."""

    attempt: int
    loss_sum: float
    num_targets: int
    samples: list[int]
    num_shares: int
    """Into how many shares the step's samples were dealt."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document, or the part of it that a row holds, as the step trained on it."""

    place: str
    """`source[first:last]`."""
    num_tokens: int
    num_targets: int
    loss_sum: float
    text: str
    """How it begins: not safe for a terminal."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came out."""

    step: int
    start: int
    """The step whose checkpoint it started from; 0: the run's beginning."""
    loss_sum: float
    num_targets: int
    grad_norm: float
    flags: int
    documents: list[Document]
    samples: range
    recorded: Recorded
    tolerance: float

    @property
    def is_same_bits(self) -> bool:
        return self.loss_sum.hex() == self.recorded.loss_sum.hex()

    @property
    def difference(self) -> float:
        """Of the loss, relative; NaN where either is none."""
        recorded = self.recorded.loss_sum
        return 0.0 if self.is_same_bits else abs(self.loss_sum - recorded) / abs(recorded or 1.0)

    @property
    def is_reproduced(self) -> bool:
        """Whether these are the samples and the loss of the run."""
        is_same_data = self.recorded.samples == list(self.samples)
        return is_same_data and self.difference <= self.tolerance


def recorded_step(folder: Path, step: int) -> Recorded:
    """Return what the ledgers of a run say about a step; ValueError where they say nothing.

    Of a step that was trained on more than once, the life that the run's weights come from counts.
    """
    owners = surviving(read_lives(folder))
    if step not in owners:
        remedy = f"set it to {min(owners)} to {max(owners)}" if owners else "give another run"
        raise ValueError(f"step={step} is not in the ledger of {folder}, or was undone; {remedy}")
    lines = owners[step].lines[step]
    loss_sum, num_targets, _ = lines[0].numbers
    shares = {line.samples for line in lines}
    return Recorded(
        attempt=owners[step].attempt, loss_sum=float.fromhex(loss_sum), num_targets=num_targets,
        num_shares=len(shares),
        samples=sorted({n for share in shares for run in share for n in range(*run)}),
    )  # fmt: skip


def replay(run: Run, folder: Path, step: int) -> Replayed:
    """Bring the run in `folder` to where step `step` began, and take the step.

    `run` is one for a single process. Nothing in the folder is changed. Steps between the newest
    intact checkpoint before it and the step are trained again first. ValueError where the ledger
    has no such step, StorageError where no checkpoint before it is intact.
    """
    recorded = recorded_step(folder, step)
    run = settle(run)
    torch.set_flush_denormal(True)  # as in training: it changes numbers
    fix_bits(run)
    ranks = Ranks(Placement(), run.timeout_seconds)
    tokenizer, loader, _ = data_of(run)
    engine, loader, start = _before(run, folder, step, ranks, loader)
    for number in range(start, step - 1):
        between = loader.step(number)
        engine.train_step(number + 1, between.micro_batches, between.num_tokens)
    data = loader.step(step - 1)
    pieces = [
        (batch, row, piece)
        for batch in data.micro_batches
        for row in range(batch.num_rows)
        for piece in pieces_of(batch, row, run.data.labels)
        if not piece.is_padding
    ]
    result = engine.train_step(step, told_apart(data, run.data.labels), data.num_tokens)
    documents = _documents(pieces, result.by_source[0].tolist(), run.data.labels, tokenizer)
    ranks.close()
    return Replayed(
        step=step, start=start, loss_sum=float(result.loss_sum),
        num_targets=int(result.num_targets), grad_norm=float(result.grad_norm),
        flags=int(result.flags), documents=documents, samples=loader.samples(step - 1),
        recorded=recorded, tolerance=TOLERANCES.get(run.precision, TOLERANCE),
    )  # fmt: skip


def _before(
    run: Run, folder: Path, step: int, ranks: Ranks, loader: StepLoader
) -> tuple[PhasedEngine, StepLoader, int]:
    """Return the run at the newest intact checkpoint before a step, and that one's step."""
    mesh = run.chosen_mesh(1)[0].build(ranks=ranks)
    guard, progress = Guard(run.spike), Progress(ranks.device, tuple(run.data.named_sources))
    engine = phased_engine(run, ranks, mesh, guard, progress)
    steps = [saved for saved in committed_steps(folder / CHECKPOINTS) if saved < step]
    contents = contents_of(run, ranks)
    # is_main would set what is damaged aside.
    state = restore(
        folder / CHECKPOINTS, engine.at, steps, contents, ranks, is_main=False, strict=False
    )
    if state is None:
        return engine.at(1), loader, 0
    place = Place(
        progress=progress, best=Best(run.best), guard=guard, loader=loader,
        bits=bits_of(ranks, mesh),
    )  # fmt: skip
    place = place.at(state, kept(read_rewinds(folder), step))
    return engine, place.loader, progress.step


def told_apart(step: Step, labels: Labels | None) -> list[Batch]:
    """Return a step's micro-batches in which each document is a source of its own.

    So the step itself counts the loss of each, and its other numbers stay what they are.
    """
    numbers, batches = count(), []
    for batch in step.micro_batches:
        sources = torch.zeros(batch.targets.shape[:2], dtype=torch.int64)
        for row in range(batch.num_rows):
            for group in _by_document(pieces_of(batch, row, labels), labels):
                number = next(numbers)
                for piece in group:
                    if batch.class_labels is None:
                        sources[row, piece.start : piece.stop] = number
                    else:
                        sources[row, _document(piece, labels)] = number
        batches.append(replace(batch, sources=sources))
    total = next(numbers)
    return [replace(batch, num_sources=total) for batch in batches]


def _document(piece: Piece, labels: Labels | None) -> int:
    """Return which document of its row a piece is of, from 0; of a pair both texts are one."""
    has_pairs = labels is not None and labels.problem_type == PREFERENCE
    return (piece.segment - 1) // (2 if has_pairs else 1)


def _by_document(pieces: Sequence[Piece], labels: Labels | None) -> list[list[Piece]]:
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        if not piece.is_padding:
            groups.setdefault(_document(piece, labels), []).append(piece)
    return list(groups.values())


def _documents(
    pieces: list[tuple[Batch, int, Piece]],
    losses: list[float],
    labels: Labels | None,
    tokenizer: Tokenizer,
) -> list[Document]:
    """Return the documents in the order in which they were numbered."""
    groups: dict[tuple[int, int, int], list[tuple[Batch, int, Piece]]] = {}
    for batch, row, piece in pieces:
        groups.setdefault((id(batch), row, _document(piece, labels)), []).append(
            (batch, row, piece)
        )
    found = []
    for group, loss in zip(groups.values(), losses, strict=True):
        batch, row, first = group[0]
        ids = batch.input_ids[row, first.start : min(first.stop, first.start + TEXT_TOKENS)]
        document = Document(
            place=first.provenance, num_tokens=sum(piece.num_tokens for _, _, piece in group),
            num_targets=first.num_targets, loss_sum=loss, text=_text(ids.tolist(), tokenizer),
        )  # fmt: skip
        found.append(document)
    return found


def _text(ids: list[int], tokenizer: Any) -> str:
    """Return the text of tokens that the tokenizer knows: others stand for images, or for none."""
    return str(tokenizer.decode([n for n in ids if n < tokenizer.vocab_size]))
