"""Muon against one by hand, the matrices it takes, and what it leaves alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.gpt_bigcode import GPTBigCodeSpec
from tests.conftest import tiny_spec
from tests.runs import tiny_run
from trainer.adapters.lora import LoRA
from trainer.engines.native import NativeEngine
from trainer.freeze import FreezeSpec, Group
from trainer.muon import Muon
from trainer.optimizers.matrices import Stacked, block_matrices
from trainer.optimizers.muon import newton_schulz
from trainer.optimizers.place import Place
from trainer.optimizers.rules import Rules
from trainer.pieces import Piece

RATE, DECAY, MOMENTUM = 0.01, 0.1, 0.95
FP64 = Place(compute=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def polynomial(matrix: Tensor) -> Tensor:
    """Jordan's five steps on the singular values alone."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def by_hand(weight: Tensor, gradients: list[Tensor], slices: list[Any]) -> Tensor:
    weight, mean = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        weight = weight - RATE * DECAY * weight
        for rows in slices:
            matrix = ahead[rows]
            weight[rows] -= RATE * 0.2 * math.sqrt(max(matrix.shape)) * polynomial(matrix)
    return weight


def optimizer_of(weights: dict[str, Tensor], matrices: dict[str, Stacked], place: Place) -> Any:
    spec = Muon(lr=RATE, weight_decay=DECAY, momentum=MOMENTUM)
    pieces = {name: Piece.of(weight) for name, weight in weights.items()}
    return spec.build(pieces=pieces, rules=Rules(matrices=matrices), place=place)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_steps_in_fp64_are_those_by_hand(shape: tuple[int, int]) -> None:
    weight, gradients = normal(0, *shape), [normal(seed, *shape) for seed in (1, 2, 3)]
    expected = by_hand(weight, gradients, [slice(None)])
    optimizer = optimizer_of({"matrix": weight}, {"matrix": Stacked()}, FP64)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert float((weight - expected).abs().max() / expected.abs().max()) < 1e-12


def test_all_else_is_moved_by_adamw() -> None:
    matrix, other = normal(0, 6, 10), normal(1, 6, 10)
    alone = other.clone()
    optimizer = optimizer_of({"matrix": matrix, "other": other}, {"matrix": Stacked()}, FP64)
    reference = torch.optim.AdamW([alone], lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    for seed in (2, 3):
        matrix.grad, other.grad = normal(seed, 6, 10), normal(seed, 6, 10)
        alone.grad = other.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(other, alone, rtol=1e-14, atol=0)
    assert set(optimizer.state[matrix]) == {"step", "momentum_buffer"}
    assert set(optimizer.state[other]) == {"step", "exp_avg", "exp_avg_sq"}


def test_in_bf16_it_is_torchs_own() -> None:
    """torch 2.13 has Muon for whole matrices, always in bf16."""
    weight = normal(0, 24, 40).float()
    other = nn.Parameter(weight.clone())
    optimizer = optimizer_of(
        {"matrix": weight}, {"matrix": Stacked()}, Place(compute=torch.bfloat16)
    )
    reference = torch.optim.Muon(
        [other], lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    start = weight.clone()
    for seed in (1, 2, 3):
        weight.grad = normal(seed, 24, 40).float()
        other.grad = weight.grad.clone()
        optimizer.step()
        reference.step()
    moved = (other.detach() - start).abs().mean()
    assert float((weight - other.detach()).abs().mean() / moved) < 2e-2


def test_singular_values_come_to_about_one() -> None:
    values = torch.linalg.svdvals(newton_schulz(normal(0, 40, 60), 5))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_skipped_step_changes_nothing(dtype: torch.dtype) -> None:
    weights = {"matrix": normal(0, 6, 10).to(dtype), "norm": normal(1, 6).to(dtype)}
    optimizer = optimizer_of(weights, {"matrix": Stacked()}, Place(compute=dtype))
    kept: list[Tensor] = []
    for is_skipped in (False, True, False):
        for weight in weights.values():
            weight.grad = torch.full_like(weight, torch.nan if is_skipped else 0.5)
        optimizer.found_inf = torch.full((), float(is_skipped))
        optimizer.step()
        state = [value for each in optimizer.state.values() for value in each.values()]
        now = [tensor.clone() for tensor in (*weights.values(), *state)]
        if kept:
            same = [torch.equal(a, b) for a, b in zip(now, kept, strict=True)]
            assert all(same) if is_skipped else not any(same)
        kept = now


@pytest.mark.parametrize("multi_query", [True, False])
def test_fused_projections_are_several_matrices(multi_query: bool) -> None:
    spec = GPTBigCodeSpec(
        vocab_size=258, n_embd=16, n_layer=1, n_head=4, n_positions=64, multi_query=multi_query
    )
    model = spec.build_causal_lm(chunk_tokens=24)
    name = "transformer.h.0.attn.c_attn.weight"
    stacked = block_matrices(model, spec.layout)[name]
    weight = model.get_parameter(name).detach()
    size = 4
    if multi_query:
        slices: list[Any] = [slice(0, 16), slice(16, 20), slice(20, 24)]
    else:  # of each head its query, key and value
        heads = torch.arange(48).view(4, 3, size)
        slices = [heads[:, part].flatten() for part in range(3)]
    found = stacked.split(weight)
    assert len(found) == 3
    for matrix, rows in zip(found, slices, strict=True):
        assert torch.equal(matrix, weight[rows])
    assert torch.equal(stacked.join(found), weight)
    start, gradient = normal(0, *weight.shape), normal(1, *weight.shape)
    expected = by_hand(start, [gradient], slices)
    optimizer = optimizer_of({name: start}, {name: stacked}, FP64)
    start.grad = gradient
    optimizer.step()
    assert float((start - expected).abs().max() / expected.abs().max()) < 1e-12


def test_matrices_of_blocks_are_taken_and_nothing_else(cache: Path) -> None:
    run = tiny_run(cache, optim=Muon(lr=1e-2), model=tiny_spec(tie_word_embeddings=False))
    model = run.trained_model()
    found = run.rules(model).matrices
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(found) == 2 * len(linears)
    assert all(name.split(".")[-2] in linears for name in found)
    frozen = FreezeSpec(groups={"a": Group(names=("*.mlp.*",), frozen=True)})
    run = tiny_run(cache, optim=Muon(lr=1e-2), freeze=frozen)
    assert len(run.rules(run.trained_model()).matrices) == 2 * 4


def test_what_cannot_work_is_refused_before_a_start(cache: Path) -> None:
    muon = Muon(lr=1e-2)
    with pytest.raises(ValueError, match="factors of adapters are none"):
        tiny_run(cache, optim=muon, adapter=LoRA(rank=2)).check(1)
    offloads = NativeEngine(offload_optimizer=True)
    with pytest.raises(ValueError, match="multiply optim=muon's matrices on the host"):
        tiny_run(cache, optim=muon, engine=offloads).check(1)
    with pytest.raises(ValueError, match="num_iterations=0 is out of range"):
        Muon(lr=1e-2, num_iterations=0)
    with pytest.raises(ValueError, match=r"optim.momentum"):
        Muon(lr=1e-2, momentum=1.0)
