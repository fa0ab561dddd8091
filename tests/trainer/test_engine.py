"""The native engine against one obvious step: one large batch, plain cross-entropy, plain SGD."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.parity.oracle import specs
from models.nn.head import IGNORED
from models.nn.init import initial_values, initializers
from tests.conftest import tiny_spec
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.texts import texts_in
from trainer.batch import Batch
from trainer.data.pretraining import PretrainingData
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.engines.protocol import Surroundings
from trainer.engines.update import Update
from trainer.freeze import FreezeSpec
from trainer.mesh import MeshSpec
from trainer.optim import SGD, AdamW
from trainer.optimizers.rules import Rules
from trainer.parallel.materialise import random_values
from trainer.parallel.pieces import named_pieces, unique_parameters
from trainer.pieces import is_vector
from trainer.precision import PRECISIONS
from trainer.schedule import Constant

DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
HSDP = MeshSpec(dp_replicate=2, dp_shard=2)
ROWS, STD = 8, 0.2


def masked(batch: Batch, first_row: int) -> Batch:
    """Make target counts uneven: two rows of the step train nothing, others every k-th token."""
    labels = batch.labels.clone()
    for place in range(labels.shape[0]):
        row = first_row + place
        keep = torch.arange(labels.shape[1]) % (row + 1) == 0
        labels[place, ~keep if row >= 2 else slice(None)] = IGNORED
    return replace(batch, labels=labels)


def one_step(
    placement: Placement, cache: Path, mesh: MeshSpec, micro_rows: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Take `steps` optimizer steps; return what rank 0 sees: numbers, and whole weights by name."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    built = mesh.build(ranks=ranks)
    spec = tiny_spec(**options.get("model", {}))
    precision = PRECISIONS[options.get("precision", "fp64")]
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=24).to(precision.master)
    options.get("freeze", FreezeSpec()).apply(model)
    native = NativeEngine()
    values = random_values(model, STD, 0)
    around = Surroundings(
        layout=spec.layout, mesh=built, precision=precision, device=ranks.device,
        optim=options.get("optim", SGD(lr=0.5)), schedule=Constant(), seed=0, max_steps=10,
    )  # fmt: skip
    laid_out = native.lay_out(model, around)
    laid_out.fill(ranks.device, values)
    engine = native.build(laid_out, around)
    loader, _ = data_spec(cache, micro_rows).build(
        tokenizer=data_spec(cache, 1).tokenizer("byte", 258),
        seed=0,
        rank=built.dp_rank,
        num_ranks=built.dp_size,
    )
    for number in range(options.get("steps", 1)):
        step = loader.step(number)
        base = number * ROWS
        batches = [
            masked(batch, first - base)
            for batch, (first, _) in zip(step.micro_batches, step.ranges, strict=True)
        ]
        result = engine.train_step(number + 1, batches, step.num_tokens)
    return {
        "loss_sum": float(result.loss_sum),
        "num_targets": int(result.num_targets),
        "num_tokens": int(result.num_tokens),
        "grad_norm": float(result.grad_norm),
        "weights": {name: whole(p).tolist() for name, p in unique_parameters(model)},
    }


def whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().double()


def data_spec(cache: Path, micro_rows: int) -> PretrainingData:
    return PretrainingData(
        path=str(texts_in(cache)), row_tokens=32, global_rows=ROWS, micro_rows=micro_rows,
        max_documents=10, cache=str(cache),
    )  # fmt: skip


def reference(cache: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One process, one batch, all logits, autograd and SGD by hand, in fp64."""
    spec = tiny_spec(**options.get("model", {}))
    model = spec.build_causal_lm(chunk_tokens=24).double()
    stds = initializers(model, STD)
    for name, parameter in unique_parameters(model):
        values = initial_values(name, stds[name], 0, 0, parameter.numel())
        parameter.data.copy_(values.view(parameter.shape))
    loader, _ = data_spec(cache, ROWS).build(
        tokenizer=data_spec(cache, 1).tokenizer("byte", 258), seed=0, rank=0, num_ranks=1
    )
    batch = masked(loader.step(0).micro_batches[0], 0)
    logits = model(batch.input_ids, batch.position_ids, batch.segment_ids)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    num_targets = int((batch.labels != IGNORED).sum())
    norm = float(sum(p.grad.square().sum() for _, p in unique_parameters(model)).sqrt())
    clip = min(1.0, options.get("clip", float("inf")) / (norm + 1e-6))
    updated = {n: (p.detach() - 0.5 * clip * p.grad).tolist() for n, p in unique_parameters(model)}
    return {
        "loss_sum": loss.item() * num_targets,
        "num_targets": num_targets,
        "num_tokens": ROWS * 32,
        "grad_norm": norm,
        "weights": updated,
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["num_targets"] == expected["num_targets"]
    assert found["num_tokens"] == expected["num_tokens"]
    for key in ("loss_sum", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance, abs=0), key
    for name, values in expected["weights"].items():
        a, b = torch.tensor(found["weights"][name]), torch.tensor(values)
        assert float((a - b).abs().max() / b.abs().max()) < tolerance, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("world_size", "mesh", "micro_rows"),
    [
        (1, DDP, 8), (1, DDP, 2), (1, DDP, 1), (2, DDP, 2), (2, FSDP, 4),
        (2, FSDP, 1), (4, DDP, 1), (4, FSDP, 2), (4, HSDP, 1),
    ],
)  # fmt: skip
def test_an_sgd_step_on_uneven_targets_equals_the_one_by_hand(
    cache: Path, world_size: int, mesh: MeshSpec, micro_rows: int, tied: bool
) -> None:
    # Rows 0 and 1 train nothing: some micro-batches, and with 4 ranks a whole rank, have no target.
    options = {"model": {"tie_word_embeddings": tied}}
    expected = reference(cache, options)
    found = run_ranks(world_size, one_step, cache, mesh, micro_rows, options)
    for outcome in found:
        assert_equal(outcome, expected, 1e-12)


def test_a_rank_without_rows_of_a_weight_takes_part(cache: Path) -> None:
    # k and v have 2 rows: on 4 ranks two of the shards are empty.
    options = {"model": {"num_key_value_heads": 1, "head_dim": 2}}
    expected = reference(cache, options)
    for outcome in run_ranks(4, one_step, cache, FSDP, 1, options):
        assert_equal(outcome, expected, 1e-12)


def test_clipping_scales_the_update_to_the_norm(cache: Path) -> None:
    norm = reference(cache, {})["grad_norm"]
    optim = SGD(lr=0.5, max_grad_norm=norm / 3)
    expected = reference(cache, {"clip": norm / 3})
    for world_size, mesh in ((1, DDP), (2, FSDP)):
        (found, *_) = run_ranks(world_size, one_step, cache, mesh, 2, {"optim": optim})
        assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_has_the_bits_of_a_factor_in_fp64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator).to(dtype) for n in (1, 7, 999)]
    norm = torch.tensor(3.0, dtype=torch.float64).sqrt()
    expected = [gradient * (0.7 / (norm + 1e-6)) for gradient in gradients]
    update: Any = SimpleNamespace(optim=SGD(lr=1.0, max_grad_norm=0.7))
    Update._clip(update, gradients, norm, None)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize(("world_size", "mesh"), [(1, DDP), (2, DDP), (2, FSDP)])
def test_dropout_depends_on_the_place_in_the_step_and_not_on_the_layout(
    cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    options = {"model": {"attention_dropout": 0.3}, "optim": AdamW(lr=1e-2), "steps": 3}
    (expected,) = run_ranks(1, one_step, cache, DDP, 2, options)
    (found, *_) = run_ranks(world_size, one_step, cache, mesh, 2, options)
    assert_equal(found, expected, 1e-12)
    (without,) = run_ranks(1, one_step, cache, DDP, 2, {**options, "model": {}})
    assert without["loss_sum"] != expected["loss_sum"]


@pytest.mark.parametrize(("world_size", "mesh"), [(1, DDP), (2, DDP), (2, FSDP)])
def test_frozen_parts_stay_and_the_rest_trains_as_before(
    cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    freeze = FreezeSpec(frozen=("model.layers.0.*",))
    options = {"freeze": freeze, "optim": AdamW(lr=1e-2, weight_decay=0.5), "steps": 2}
    (start,) = run_ranks(
        1, one_step, cache, DDP, 2, {**options, "steps": 1, "optim": SGD(lr=1e-30)}
    )
    (expected,) = run_ranks(1, one_step, cache, DDP, 8, options)
    (found, *_) = run_ranks(world_size, one_step, cache, mesh, 2, options)
    assert_equal(found, expected, 1e-12)
    for name, values in start["weights"].items():
        is_frozen = name.startswith("model.layers.0.")
        assert (found["weights"][name] == values) == is_frozen, name


def poisoned(placement: Placement, cache: Path, mesh: MeshSpec) -> list[bool]:
    """Step with a NaN weight gradient on one rank only; return whether all stayed as it was."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    built = mesh.build(ranks=ranks)
    spec, precision = tiny_spec(), PRECISIONS["fp32"]
    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=24)
    native = NativeEngine()
    values = random_values(model, STD, 0)
    around = Surroundings(
        layout=spec.layout, mesh=built, precision=precision, device=ranks.device,
        optim=AdamW(lr=1e-2), schedule=Constant(), seed=0, max_steps=10,
    )  # fmt: skip
    laid_out = native.lay_out(model, around)
    laid_out.fill(ranks.device, values)
    engine = native.build(laid_out, around)
    loader, _ = data_spec(cache, 2).build(
        tokenizer=data_spec(cache, 1).tokenizer("byte", 258),
        seed=0, rank=built.dp_rank, num_ranks=built.dp_size,
    )  # fmt: skip
    outcomes = []
    for number in range(3):
        before = snapshot(engine)
        step = loader.step(number)
        handle = None
        if number == 1 and built.dp_rank == built.dp_size - 1:
            handle = model.get_submodule("model.norm").register_full_backward_hook(
                lambda _, grads, __: tuple(g * float("nan") for g in grads)
            )
        result = engine.train_step(number + 1, step.micro_batches, step.num_tokens)
        if handle:
            handle.remove()
        after = snapshot(engine)
        is_same = all(torch.equal(before[name], after[name]) for name in before)
        outcomes += [bool(result.skipped), is_same]
    return outcomes


def snapshot(engine: Any) -> dict[str, Tensor]:
    pieces = engine.weights() | engine.optimizer_state()
    return {name: piece.local.clone() for name, piece in pieces.items()}


@pytest.mark.parametrize(("world_size", "mesh"), [(1, DDP), (2, DDP), (2, FSDP)])
def test_a_nan_on_one_rank_makes_every_rank_skip_and_changes_nothing(
    cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    for outcome in run_ranks(world_size, poisoned, cache, mesh):
        assert outcome == [False, False, True, True, False, False]


def test_weight_decay_spares_norms_biases_and_embeddings_on_every_layout() -> None:
    spec = tiny_spec(attention_bias=True, tie_word_embeddings=False)
    model: nn.Module = spec.build_causal_lm(chunk_tokens=8)
    pieces = named_pieces(unique_parameters(model))
    optimizer = AdamW(lr=1e-2, weight_decay=0.3).build(
        pieces=pieces, rules=Rules(no_decay=("model.embed_tokens.weight",))
    )
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, piece in pieces.items():
        is_matrix = name.endswith("proj.weight") or name == "lm_head.weight"
        assert (id(piece.local) in decayed) == is_matrix, name


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_weight_decay_spares_the_gates_of_an_idefics_in_every_shape(alpha_type: str) -> None:
    """As in the public m4: a gate of (1, 1, D) is one number per feature, no matrix."""
    model = replace(specs()["Idefics"], alpha_type=alpha_type).build_causal_lm(chunk_tokens=8)
    model.requires_grad_(True)
    pieces = named_pieces(unique_parameters(model))
    optimizer = AdamW(lr=1e-2, weight_decay=0.3).build(pieces=pieces, rules=Rules())
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    spared = {name for name, piece in pieces.items() if id(piece.local) not in decayed}
    gates = {name for name in pieces if "alpha_" in name}
    assert len(gates) == 4
    ends = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "ln.weight", "class_embedding")
    assert spared == gates | {name for name in pieces if name.endswith(ends)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), True), ((8,), True), ((1, 1, 8), True), ((1, 1), False), ((1, 8), False),
     ((8, 1), False), ((4, 3, 2, 2), False)],
)  # fmt: skip
def test_a_matrix_of_one_row_is_no_vector(shape: tuple[int, ...], expected: bool) -> None:
    assert is_vector(shape) is expected


def test_a_bf16_run_keeps_masters_in_fp32_and_ddp_equals_fsdp_in_the_first_step(
    cache: Path,
) -> None:
    options = {"precision": "bf16"}
    (expected,) = run_ranks(1, one_step, cache, DDP, 2, options)
    for mesh in (DDP, FSDP):
        (found, *_) = run_ranks(2, one_step, cache, mesh, 2, options)
        # The same bf16 products on every layout: only the order of fp32 sums differs.
        assert_equal(found, expected, 1e-6)
    values = torch.tensor(expected["weights"]["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(values, values.bfloat16().double())
