"""Steps of text, of images and of both, on every engine: against all documents one by one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache as memo
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.nn.head import IGNORED
from tests.distributed.cases import LAYOUTS, ZERO, spec_of
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run
from trainer.adapters.contents import contents_of
from trainer.batch import Batch
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.lock import RunLock
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.parallel.materialise import materialise, random_values
from trainer.run import Run
from trainer.verify.compare import CURVE_TOLERANCE, FP32, FP64
from trainer.verify.rows import MadeRows
from trainer.verify.whole import Tensors, deviation, whole

import_deepspeed("cpu")  # once, not in every rank
ALL = tuple(range(8))
# Rows with images of each step. A micro-batch has two rows; of two ranks the first has rows 0, 1,
# 4 and 5.
MIXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "text alone": ((), (), ()),
    "images alone": (ALL, ALL, ALL),
    "one rank or the other": ((0, 4), (2, 7), (3, 5)),
    "first micro-batches": ((0, 1, 2, 3), (1,), (2, 3)),
    "last micro-batches": ((4, 5, 6, 7), (6,), (5,)),
    "text, then images": ((), (), (0, 6)),
    "images, then text": ((1, 2), (), ()),
    "in turn": ((), (0, 4), (4, 5, 6, 7), (), (0, 1, 2, 3), (6,)),
}
IN_TURN = "in turn"
ALL_STEPS = range(1, 1 + max(map(len, MIXES.values())))
OFFLOADED = ", offloaded"
ADAMW = AdamW(lr=1e-2, eps=1e-3, max_grad_norm=0.5)


@dataclass(frozen=True, kw_only=True)
class MixedRows(MadeRows):
    """Made rows of which those that a mix says have images."""

    mix: str

    def rows_with_images(self, step: int) -> tuple[int, ...]:
        return MIXES[self.mix][step - 1]


def mixed(cache: Path, mix: str, *, trains: bool = True, **changes: Any) -> tuple[Run, MixedRows]:
    """Return a run of an Idefics, in fp64, and its rows; `trains`: text and tower too."""
    spec = replace(
        spec_of("Idefics", tied=False),
        freeze_text_layers=not trains, freeze_vision_layers=not trains,
    )  # fmt: skip
    run = tiny_run(cache, **({"model": spec, "precision": "fp64", "optim": ADAMW} | changes))
    rows = MixedRows(
        vocab_size=spec.vocab_size + spec.additional_vocab_size, images=(2, 3, 12), mix=mix
    )
    return run, rows


def laid_out(layout: str) -> dict[str, Any]:
    """Return the settings of a layout."""
    engine: Any = NativeEngine()
    name = layout.removesuffix(OFFLOADED)
    if name in ZERO:
        sharded = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # small ones too
        engine = DeepSpeedEngine(
            stage=ZERO[name], config=sharded if ZERO[name] == 3 else {},
            offload_optimizer=name != layout,
        )  # fmt: skip
    elif layout == "accelerate":
        engine = AccelerateEngine()
    precision = "fp32" if name in ZERO else "fp64"
    return {"mesh": LAYOUTS.get(name, MeshSpec()), "engine": engine, "precision": precision}


def num_ranks(run: Run) -> int:
    return prod(run.mesh.lengths.values())


def computed(
    placement: Placement,
    run: Run,
    rows: MixedRows,
    steps: range = ALL_STEPS,
    folder: Path | None = None,
) -> list[Tensors]:
    """Return loss, norm, weights and optimizer state after each of the steps. Collective.

    `folder`: where the step before the first was saved, if any, and the last will be.
    """
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    engine = build_engine(run, run.trained_model(), ranks, mesh)
    checkpoints = checkpoints_in(folder, run, ranks) if folder else None
    if checkpoints and steps.start > 1:
        assert checkpoints.restore(lambda _: engine, [steps.start - 1]) is not None
    found, complaints = [], []
    for step in steps[: len(MIXES[rows.mix])]:
        batches = rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        result = engine.train_step(step, batches, rows.num_tokens(batches))
        state = whole(engine.weights() | engine.optimizer_state(), ranks, complaints) or {}
        loss = float(result.loss_sum / result.num_targets)
        numbers = {"loss": np.array(loss), "norm": np.array(float(result.grad_norm))}
        found.append(numbers | state)
    assert not complaints
    if checkpoints:
        checkpoints.save(steps[-1], engine, {}, is_last=True)
    ranks.barrier()
    ranks.close()
    return found


def checkpoints_in(folder: Path, run: Run, ranks: Ranks) -> Checkpoints:
    lock = RunLock(folder) if ranks.placement.is_main else None
    return Checkpoints(
        run.checkpoint, folder, ranks=ranks, lock=lock, facts={}, describe_model=lambda _: None,
        contents=contents_of(run, ranks),
    )  # fmt: skip


def one_by_one(batches: list[Batch]) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Yield ids, labels and images of every document, which has none where it sees none."""
    for batch in batches:
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(1, int(segments.max()) + 1):
                own = segments == segment
                images = {}
                if batch.image_attention_mask is not None and batch.pixel_values is not None:
                    mask = batch.image_attention_mask[row, own]
                    if mask.any():
                        pixels = batch.pixel_values[row]
                        images = {"pixel_values": pixels[None], "image_attention_mask": mask[None]}
                yield batch.input_ids[row, own], batch.labels[row, own], images


@memo
def by_hand(cache: Path, mix: str, trains: bool) -> list[Tensors]:
    """Return what `computed` does, by torch's own optimizer in a plain loop over documents."""
    run, rows = mixed(cache, mix, trains=trains)
    model: Any = run.trained_model()
    materialise(model, torch.device("cpu"), random_values(model, run.model.initializer_range, 0))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.1 * (p.ndim > 1 and "embed_tokens" not in name)}
            for name, p in trained.items()
        ],
        lr=ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps,
    )  # fmt: skip
    found = []
    for step in range(1, len(MIXES[mix]) + 1):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids, labels, images in one_by_one(rows.micro_batches(step, 0, 1)):
            places = torch.arange(len(ids))
            logits = model(ids[None], places[None], torch.ones_like(ids)[None], **images)[0]
            total = total + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
        (total / count).backward()
        for weight in trained.values():
            if weight.grad is None:  # nothing was seen: the loss does not depend on it
                weight.grad = torch.zeros_like(weight)
        norm = nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append(
            {"loss": (total / count).detach().numpy(), "norm": norm.numpy()}
            | {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
            | {
                f"{kind}/{name}": value.numpy().copy()
                for name, weight in trained.items()
                for kind, value in optimizer.state[weight].items()
            }
        )
    return found


def deviations(found: list[Tensors], expected: list[Tensors], floor: float) -> list[Any]:
    """Return the worst of each step."""
    return [
        deviation(f"step {step}", ours, theirs, floor)
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1)
    ]


def assert_equal(found: list[Tensors], expected: list[Tensors], layout: str) -> None:
    is_zero = layout.startswith("zero")
    standard, limit = (FP32, CURVE_TOLERANCE) if is_zero else (FP64, FP64.tolerance)
    for worst in deviations(found, expected, standard.floor_share):
        assert worst.value <= limit, worst


FAST = [
    *((IN_TURN, layout, True) for layout in ("single", "ddp", "fsdp", "pp", "zero 3")),
    (IN_TURN, "fsdp", False),
]
EVERY = {"single", *LAYOUTS, *(f"zero {stage}{OFFLOADED}" for stage in (2, 3))} - {"tp+sp"}
SLOW = [
    *sorted(set(product([IN_TURN], EVERY, (True, False))) - set(FAST)),
    *product([mix for mix in MIXES if mix != IN_TURN], ("ddp", "fsdp", "zero 2", "zero 3"), [True]),
]


@pytest.mark.parametrize(
    ("mix", "layout", "trains"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_mix_trains_as_its_documents_one_by_one(
    cache: Path, mix: str, layout: str, trains: bool
) -> None:
    run, rows = mixed(cache, mix, trains=trains, **laid_out(layout))
    found = run_ranks(num_ranks(run), computed, run, rows)[0]
    assert_equal(found, by_hand(cache, mix, trains), layout)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ddp", "zero 3"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("zero 2", "fsdp"), ("zero 3", "hsdp"), ("fsdp", "zero 2"), ("pp", "ddp"))
        ),
    ],
)
def test_a_checkpoint_of_steps_without_images_goes_on_with_images_on_any_engine(
    tmp_path: Path, cache: Path, before: str, after: str
) -> None:
    mix, coarser = "text, then images", max(before, after)  # DeepSpeed, if one of them is
    precision = laid_out(coarser)["precision"]
    for layout, steps in ((before, range(1, 3)), (after, range(3, 4))):
        run, rows = mixed(cache, mix, **laid_out(layout) | {"precision": precision})
        found = run_ranks(num_ranks(run), computed, run, rows, steps, tmp_path)[0]
    assert_equal(found, by_hand(cache, mix, True)[2:], coarser)


def test_dropout_is_the_same_on_ranks_that_run_blank_images(cache: Path) -> None:
    """Two ranks run some where one process runs none: what is drawn for text may not move."""
    found = []
    for layout in ("single", "ddp"):
        run, rows = mixed(cache, IN_TURN, **laid_out(layout))
        spec: Any = run.model
        vision = replace(spec.vision_config, attention_dropout=0.2)
        run = replace(run, model=replace(spec, dropout=0.2, vision_config=vision))
        found.append(run_ranks(num_ranks(run), computed, run, rows, range(1, 4))[0])
    assert_equal(found[1], found[0], "ddp")
    plain = by_hand(cache, IN_TURN, True)
    assert abs(found[0][1]["loss"] / plain[1]["loss"] - 1) > 1e-3  # dropout acts
