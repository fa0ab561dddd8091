"""Groups of parameters and phases, against a loop by hand over torch's own parameter groups."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from models.nn.head import IGNORED
from tests.conftest import tiny_spec
from tests.distributed.test_topology_free import outcome
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import DieAt, tiny_run, train
from trainer.construct import build_engine
from trainer.data.tokenizers import ByteTokenizer
from trainer.distributed import Placement, Ranks
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.freeze import FreezeSpec, Group
from trainer.mesh import MeshSpec
from trainer.optim import AdamW
from trainer.parallel.materialise import materialise, random_values
from trainer.phases import PhasedEngine
from trainer.progress import Stopwatch
from trainer.protocols import Engine
from trainer.record import read_lines
from trainer.run import Run
from trainer.verify.forked import RankFailedError
from trainer.verify.rows import MadeRows

import_deepspeed("cpu")  # once, not in every rank
DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
LR, DECAY, BORDER, STEPS = 1e-2, 0.1, 3, 6
EPS = 1e-3  # large enough that a gradient of nothing but rounding moves no weight
LOWER, HEAD, EMBEDDING = "model.layers.0.", "lm_head.weight", "model.embed_tokens.weight"
GROUPS = FreezeSpec(
    frozen=("model.layers.1.mlp.up_proj.weight",),
    groups={
        "lower": Group(names=(f"{LOWER}[!s]*",), unfreeze_at=BORDER, lr_ratio=0.5),
        "attention": Group(names=(f"{LOWER}s*",), unfreeze_at=BORDER),  # as the rest, but later
        "head": Group(names=(r"re:lm_head\.w.+",), lr_ratio=10.0, weight_decay=0.02),
    },
)  # fmt: skip


def phased_run(cache: Path, **changes: Any) -> Run:
    settings = {
        "model": tiny_spec(tie_word_embeddings=False), "freeze": GROUPS, "max_steps": STEPS,
        "optim": AdamW(lr=LR, eps=EPS, weight_decay=DECAY, max_grad_norm=0.5),
    }  # fmt: skip
    return tiny_run(cache, **(settings | changes))


def ratio(name: str) -> float:
    return 0.5 if name.startswith(LOWER) and "self_attn" not in name else 1.0


def groups_by_hand(model: nn.Module, names: list[str]) -> list[dict[str, Any]]:
    """Return a parameter group for each name, as torch wants them."""
    return [
        {
            "params": [model.get_parameter(name)],
            "lr": LR * (10.0 if name == HEAD else ratio(name)),
            "weight_decay": 0.0
            if "norm" in name or name == EMBEDDING
            else (0.02 if name == HEAD else DECAY),
        }
        for name in names
    ]


def by_hand(run: Run, steps: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return weights and losses of a plain loop; the group joins torch's optimizer late."""
    model = run.plan_model()
    materialise(model, torch.device("cpu"), random_values(model, run.model.initializer_range, 0))
    never = list(GROUPS.frozen)
    lower = [name for name, _ in model.named_parameters() if name.startswith(LOWER)]
    rest = [name for name, _ in model.named_parameters() if name not in never + lower]
    for name in never + lower:
        model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_by_hand(model, rest), betas=(0.9, 0.95), eps=EPS)
    loader, _ = run.data.build(tokenizer=ByteTokenizer(), seed=0, rank=0, num_ranks=1)
    losses = []
    for number in range(steps):
        if number == BORDER:
            for group in groups_by_hand(model, lower):
                optimizer.add_param_group(group)
            for name in lower:
                model.get_parameter(name).requires_grad_(True)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in loader.step(number).micro_batches:
            logits = model(batch.input_ids, batch.position_ids, batch.segment_ids).flatten(0, 1)
            labels = batch.labels.flatten()
            total = total + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((total / count).item())
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max(folder.glob("checkpoints/step_*")) / "model" / "model.safetensors")


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def assert_close(found: Path, expected: tuple[dict[str, Any], list[float]], limit: float) -> None:
    weights, losses = expected
    assert losses_of(found) == pytest.approx(losses, rel=limit, abs=0)
    for name, difference in differences(last_weights(found), weights).items():
        assert difference < limit, name


def differences(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the largest difference of each weight, relative to its largest value."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - value.double()).abs().max() / value.abs().max())
        for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("world_size", "mesh", "engine"),
    [
        (1, DDP, NativeEngine(offload_optimizer=True)),
        (2, DDP, AccelerateEngine()),
        (2, FSDP, NativeEngine()),
        (2, MeshSpec(tp=2), NativeEngine()),
        (2, MeshSpec(pp=2), NativeEngine()),
    ],
    ids=["offloaded", "accelerate", "fsdp", "tp", "pp"],
)
def test_a_group_that_unfreezes_trains_as_in_a_loop_by_hand(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec, engine: Any
) -> None:
    run = phased_run(cache, precision="fp64", mesh=mesh, engine=engine)
    run_ranks(world_size, train, tmp_path / "run", run)
    assert_close(tmp_path / "run", by_hand(run), 1e-12)


@pytest.mark.parametrize(
    "stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))]
)
def test_deepspeed_counts_the_steps_of_each_phase_apart(
    tmp_path: Path, cache: Path, stage: int
) -> None:
    """A wrong count is wrong by hundredths; fp32 rounds, and how far depends on text and CPU.

    AdamW divides the smallest gradients by themselves, with their rounding: single elements are off
    by millionths. So the limit is ten times what the loop by hand is off in fp32, from fp64.
    """
    run = phased_run(cache, engine=DeepSpeedEngine(stage=stage), save_every=1)
    run_ranks(2, train, tmp_path / "run", replace(run, max_steps=BORDER + 2))
    run_ranks(2, train, tmp_path / "run", run)  # both counts are saved and read
    exact, losses = by_hand(replace(run, precision="fp64"))
    rounding = max(differences(by_hand(run)[0], exact).values())
    assert rounding < 5e-6
    assert losses_of(tmp_path / "run") == pytest.approx(losses, rel=1e-6, abs=0)
    assert max(differences(last_weights(tmp_path / "run"), exact).values()) < 10 * rounding


def test_runs_that_die_around_the_border_equal_one_that_never_did(
    tmp_path: Path, cache: Path
) -> None:
    run = phased_run(
        cache, deterministic="topology_free", save_every=1, data_eval_fraction=0.003, eval_every=3,
        data_global_rows=4, data_micro_rows=1,
    )  # fmt: skip
    run_ranks(1, train, tmp_path / "one", run)
    # Each dies at a log point, before the save of its step: at 2, 3 and 4 the next goes on.
    for world_size, mesh, death in ((2, FSDP, 3), (1, DDP, 4), (2, DDP, 5)):
        dying = replace(run, mesh=mesh, callbacks={"die": DieAt(death)})
        with pytest.raises(RankFailedError):
            run_ranks(world_size, train, tmp_path / "many", dying)
    run_ranks(2, train, tmp_path / "many", replace(run, mesh=FSDP))
    numbers, weights = outcome(tmp_path / "one")
    assert outcome(tmp_path / "many") == (numbers, weights)
    (phase,) = [line for line in numbers if line["split"] == "phase"]
    assert (phase["step"], phase["trained_tensors"]) == (BORDER + 1, 20)
    lines = [line["step"] for line in numbers if line["split"] == "eval"]
    assert lines == [3, 6]


def released(placement: Placement, run: Run) -> list[str]:
    """Return which weights of the first engine outlive a change."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    old: dict[str, weakref.ref[nn.Module]] = {}
    alive: list[str] = []

    def build(model: nn.Module, values: Any) -> Engine:
        if values is not None:  # before the next engine has memory
            alive.extend(name for name, module in old.items() if module() is not None)
        old.update({name: weakref.ref(module) for name, module in model.named_modules()})
        return build_engine(run, model, ranks, mesh, values)

    engine = PhasedEngine(run, build, Stopwatch(ranks.device)).at(1)
    rows = MadeRows(vocab_size=258, tokens=32, relabel=None, images=None)
    for step in (BORDER, BORDER + 1):
        batches = rows.micro_batches(step, mesh.dp_rank, mesh.dp_size)
        engine.train_step(step, batches, rows.num_tokens(batches))
    assert engine.trained.count.tensors == 20
    return alive


@pytest.mark.parametrize("mesh", [DDP, FSDP])
def test_the_old_engine_is_gone_before_the_new_one_is_built(cache: Path, mesh: MeshSpec) -> None:
    for alive in run_ranks(2, released, phased_run(cache, mesh=mesh)):
        assert alive == []
