"""AdamW with less state: against steps by hand, and the same bits wherever a piece lies."""

import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from torch import Tensor

from tests.runs import tiny_run
from trainer.optim import AdamW
from trainer.optimizers.eight_bit import BLOCK, decode, encode, table
from trainer.optimizers.lean_adamw import STATES, LeanAdamW
from trainer.optimizers.place import Place
from trainer.optimizers.rounding import Noise, rounded
from trainer.optimizers.rules import Rules
from trainer.optimizers.states import state_piece
from trainer.pieces import Piece, Rows
from trainer.planning.live import Ledger
from trainer.planning.pretend import Pretend

CPU = torch.device("cpu")
RATE, DECAY, EPS = 0.01, 0.1, 1e-8
BETAS = (0.9, 0.95)
SHAPE = (20, 600)


def normal(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def optimizer_of(weight: Tensor, states: str, piece: Piece | None = None) -> Any:
    spec = AdamW(lr=RATE, states=states, weight_decay=DECAY)
    pieces = {"block.weight": piece or Piece.of(weight)}
    return spec.build(pieces=pieces, rules=Rules(), place=Place(seed=3))


def steps(optimizer: Any, weight: Tensor, count: int, part: Any = slice(None)) -> None:
    for step in range(count):
        weight.grad = normal(100 + step)[part].to(weight.dtype).contiguous()
        optimizer.found_inf = torch.zeros(())
        optimizer.step()


def by_hand(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """AdamW in fp64, as in the paper: one line for each of its own."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        mean_hat, square_hat = mean / (1 - BETAS[0] ** step), square / (1 - BETAS[1] ** step)
        weight = weight - RATE * (mean_hat / (square_hat**0.5 + EPS) + DECAY * weight)
    return weight


def test_steps_in_fp64_are_those_by_hand() -> None:
    weight = normal(0, dtype=torch.float64)
    start = weight.clone()
    groups = [{"params": [weight], "lr": RATE, "weight_decay": DECAY}]
    pieces = {"block.weight": Piece.of(weight)}
    optimizer = LeanAdamW(groups, pieces, betas=BETAS, eps=EPS, states="weights", seed=0)
    steps(optimizer, weight, 5)
    expected = by_hand(start, [normal(100 + step).double() for step in range(5)])
    assert float((weight - expected).abs().max() / expected.abs().max()) < 1e-13


@pytest.mark.parametrize(("states", "share"), [("bf16", 0.01), ("8bit", 0.05)])
def test_less_state_moves_weights_nearly_as_far(states: str, share: float) -> None:
    weight = normal(0)
    start = weight.double()
    optimizer = optimizer_of(weight, states)
    steps(optimizer, weight, 20)
    expected = by_hand(start, [normal(100 + step).double() for step in range(20)])
    error = (weight - expected).abs().mean() / (expected - start).abs().mean()
    assert 0 < float(error) < share


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(states: str, dtype: torch.dtype) -> None:
    weight = normal(0).to(dtype)
    optimizer = optimizer_of(weight, states)
    steps(optimizer, weight, 2)
    state = optimizer.state[weight]
    before = [tensor.clone() for tensor in (weight, *state.values())]
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for tensor, old in zip((weight, *state.values()), before, strict=True):
        assert torch.equal(tensor, old)
    steps(optimizer, weight, 1)
    assert not torch.equal(weight, before[0])


def test_the_table_is_that_of_the_paper_but_for_zero_among_squares() -> None:
    for is_signed in (True, False):
        found = table(CPU, is_signed=is_signed)
        expected = bitsandbytes.create_dynamic_map(signed=is_signed).cpu()
        assert len(found.unique()) == 256
        different = (found - expected).abs() > 1e-6 * expected.abs()
        if is_signed:
            assert not different.any()
        else:
            assert expected[different].tolist() == [0.0]
            assert float(found[different]) == pytest.approx(1e-7)


def test_a_table_that_a_plan_asked_for_first_is_the_same() -> None:
    expected = table(CPU, is_signed=True).clone()
    table.cache_clear()
    with Pretend(Ledger()):
        table(CPU, is_signed=True)
    assert torch.equal(table(CPU, is_signed=True), expected)


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_those_of_the_nearest_value_of_the_table(is_signed: bool) -> None:
    values = normal(1, (3, BLOCK + 44)) ** 3
    values = values if is_signed else values.abs()
    codes, scales = encode(values, is_signed=is_signed)
    entries = table(CPU, is_signed=is_signed)
    for row in range(3):
        for block in range(2):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            own = values[row, part]
            assert float(scales[row, block]) == float(own.abs().max())
            distances = (own[:, None] / scales[row, block] - entries).abs()
            nearest = distances.min(dim=1).values
            chosen = distances.gather(1, codes[row, part].long()[:, None])[:, 0]
            assert torch.allclose(chosen, nearest, rtol=1e-5, atol=1e-9)
    error = (decode(codes, scales, is_signed=is_signed) - values).abs()
    assert float(error.mean() / values.abs().mean()) < 0.02


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_those_of_a_search_for_every_upper_half_of_a_number(is_signed: bool) -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = [(halves | low).view(torch.float32) for low in (0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)]
    values = torch.cat(ends)
    values = values[values.abs() <= 1]
    values = values if is_signed else values.abs()
    values = torch.cat([values[: len(values) // BLOCK * BLOCK], values[-BLOCK:]]).view(-1, BLOCK)
    values[:, 0] = 1.0  # the scale
    entries = table(CPU, is_signed=is_signed)
    expected = torch.bucketize(values, (entries[1:] + entries[:-1]) / 2)
    codes, _ = encode(values, is_signed=is_signed)
    assert torch.equal(codes.long(), expected)


def test_a_block_of_zeros_stays_one() -> None:
    for is_signed in (True, False):
        codes, scales = encode(torch.zeros(1, BLOCK), is_signed=is_signed)
        assert not decode(codes, scales, is_signed=is_signed).any()


def cut(piece: Piece, first: int, last: int, columns: tuple[int, int]) -> Piece:
    rows = (Rows(start=first, stop=last),)
    local = piece.local[first:last, slice(*columns)].clone()
    return Piece(local=local, shape=piece.shape, rows=rows, columns=columns)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 7), (0, 600)), ((7, 20), (0, 600)), ((0, 20), (256, 512))]
)
def test_a_piece_has_the_bits_of_its_place_in_the_whole(
    states: str, dtype: torch.dtype, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    if states == "weights" and dtype == torch.float32:
        states = "bf16"  # else it is torch's
    whole = normal(0).to(dtype)
    piece = cut(Piece.of(whole), *rows, columns)
    optimizers = optimizer_of(whole, states), optimizer_of(piece.local, states, piece)
    part = slice(*rows), slice(*columns)
    steps(optimizers[0], whole, 3)
    steps(optimizers[1], piece.local, 3, part)
    assert torch.equal(piece.local, whole[part])
    for kind, value in optimizers[1].state[piece.local].items():
        of_whole = optimizers[0].state[whole][kind]
        lies = state_piece(piece, value, is_own=True)
        stored = state_piece(Piece.of(whole), of_whole, is_own=True)
        assert lies.shape == stored.shape
        flat = of_whole.reshape(-1)
        assert torch.equal(lies.cut(lambda start, stop, flat=flat: flat[start:stop]), value)


def test_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    value = 1 + 2**-9 + 2**-11  # between 1 and 1 + 2^-7, at 5/16 of the way
    values = torch.full((100, 1000), value)
    bits = Noise(Piece.of(values), "name", 0).bits(torch.ones(()), 0, 100)
    for use in range(3):
        found = rounded(values, bits, use)
        assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
        up = float((found > 1).float().mean())
        assert abs(up - 5 / 16) < 4 * math.sqrt(5 / 16 * 11 / 16 / values.numel())
    exact = torch.tensor([[0.0, -1.5, 3.0]])
    assert torch.equal(rounded(exact, bits[:1, :3], 0).float(), exact)


def test_another_step_name_or_seed_draws_other_numbers() -> None:
    values = torch.full((8, 64), 1 + 2**-8)  # half of the way to the next one
    piece, one = Piece.of(values), torch.ones(())
    first = Noise(piece, "a", 0).bits(one, 0, 8)
    assert torch.equal(first, Noise(piece, "a", 0).bits(one, 0, 8))
    others = (
        Noise(piece, "a", 0).bits(one * 2, 0, 8), Noise(piece, "b", 0).bits(one, 0, 8),
        Noise(piece, "a", 1).bits(one, 0, 8),
    )  # fmt: skip
    for other in others:
        assert float((other == first).float().mean()) < 0.01
        for use in range(3):
            pair = [rounded(values, bits, use) > 1 for bits in (first, other)]
            correlation = torch.corrcoef(torch.stack(pair).view(2, -1).double())[0, 1]
            assert abs(float(correlation)) < 0.2  # of 512 independent ones: 0.04 at one sigma


@pytest.mark.parametrize(("rounding", "moves"), [("stochastic", True), ("nearest", False)])
def test_updates_below_half_a_bit_of_bf16_arrive_on_average(rounding: str, moves: bool) -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    spec = AdamW(lr=1e-4, weight_decay=0.0, rounding=rounding)
    optimizer: Any = spec.build(
        pieces={"block.weight": Piece.of(weight)}, rules=Rules(), place=Place()
    )
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = float(1 - weight.double().mean())
    assert moved == (pytest.approx(10 * 1e-4, rel=0.1) if moves else 0.0)


def test_a_rounding_without_effect_is_refused(cache: Path) -> None:
    nearest = AdamW(lr=1e-3, rounding="nearest")
    tiny_run(cache, optim=nearest, precision="pure_bf16").check(1)
    with pytest.raises(ValueError, match="no weight that trains is bf16"):
        tiny_run(cache, optim=nearest).check(1)
    with pytest.raises(ValueError, match=r"has no effect with optim.states=8bit"):
        AdamW(lr=1e-3, rounding="nearest", states="8bit")
    with pytest.raises(ValueError, match="states=4bit is unknown"):
        AdamW(lr=1e-3, states="4bit")
