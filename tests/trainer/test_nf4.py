"""NF4 against a slow reference: codes, scales, bytes, types, and shapes that fit no block."""

import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from trainer.adapters.lora import LoRA
from trainer.adapters.nf4 import BLOCK, OUTER_BLOCK, PackedWeight, Packing, packing

# Dettmers et al. 2023, appendix E.
TABLE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
SHAPES = [(16, 16), (32, 16), (24, 40), (3, 64), (128, 192), (5, 13), (7, 9), (1, 2)]
SINGLE = Packing(quantize="nf4", use_double_quant=False)
DOUBLE = Packing(quantize="nf4", use_double_quant=True)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def packed(weight: Tensor, how: Packing, dtype: torch.dtype = torch.float32) -> PackedWeight:
    pytest.importorskip("bitsandbytes")
    return how(weight, dtype)


def blocks(numbers: list[Any], size: int = BLOCK) -> list[list[Any]]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def nearest(table: list[float], value: float) -> int:
    return min(range(len(table)), key=lambda code: abs(table[code] - value))


def slow_nf4(weight: Tensor) -> tuple[list[int], list[float]]:
    """Return the code of every number, and the scale of every block."""
    codes, scales = [], []
    for block in blocks(weight.flatten().tolist()):
        scale = max(abs(number) for number in block)
        scales.append(scale)
        codes += [nearest(TABLE, number / scale) for number in block]
    return codes, scales


def slow_scales(scales: list[float], bits: list[int], table: list[float]) -> list[float]:
    """Return the scales that 8 bits stand for: less their mean, by the nearest entry of `table`.

    Nearest to 2 ** -15 of the largest: that fine is the grid by which the CPU kernel searches.
    """
    mean = sum(scales) / len(scales)
    found = []
    for block, chosen in zip(
        blocks([scale - mean for scale in scales], OUTER_BLOCK), blocks(bits, OUTER_BLOCK),
        strict=True,
    ):  # fmt: skip
        top = max(abs(number) for number in block)
        for number, code in zip(block, chosen, strict=True):
            best = table[nearest(table, number / top)]
            assert abs(table[code] - number / top) <= abs(best - number / top) + 2**-15
            found.append(table[code] * top + mean)
    return found


def codes_of(found: PackedWeight) -> list[int]:
    pairs = [divmod(int(byte), 16) for byte in found.codes.flatten()]
    return [code for pair in pairs for code in pair][: found.shape.numel()]


def test_the_table_holds_the_quantiles_that_the_paper_says() -> None:
    """Equation 4, with a zero of its own: 8 steps above it, 7 below, of an even probability."""
    offset = 0.9677083
    above = [scipy.stats.norm.ppf(offset + (0.5 - offset) * n / 8) for n in range(8)]
    below = [-scipy.stats.norm.ppf(offset + (0.5 - offset) * n / 7) for n in range(7)]
    expected = sorted([*above, 0.0, *below])
    assert pytest.approx([value / max(expected) for value in expected], abs=1e-6) == TABLE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_of_the_slow_reference(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    found = packed(weight, SINGLE)
    codes, scales = slow_nf4(weight)
    assert codes_of(found) == codes
    assert found.state.absmax.tolist() == scales
    factors = torch.tensor(scales).repeat_interleave(BLOCK)[: weight.numel()]
    expected = torch.tensor([TABLE[code] for code in codes]) * factors
    assert torch.equal(found(), expected.view(shape))


@pytest.mark.parametrize("shape", [(128, 192), (256, 192)], ids=str)
def test_double_quantisation_keeps_each_scale_as_the_nearest_of_256(shape: tuple[int, int]) -> None:
    """One block of scales, and three of them: the rounding of what they are made of, 1e-6."""
    weight = drawn(*shape) * torch.linspace(0.5, 2.0, shape[0])[:, None]
    found = packed(weight, DOUBLE)
    codes, scales = slow_nf4(weight)
    assert codes_of(found) == codes  # which the scales do not change
    state = found.state
    slow = slow_scales(scales, state.absmax.tolist(), state.state2.code.tolist())
    factors = torch.tensor(slow).repeat_interleave(BLOCK)
    expected = (torch.tensor([TABLE[code] for code in codes]) * factors).view(shape)
    assert torch.allclose(found(), expected, rtol=1e-6, atol=0)
    assert not torch.equal(found(), packed(weight, SINGLE)())


@pytest.mark.parametrize("how", [SINGLE, DOUBLE], ids=["single", "double"])
def test_zeros_stay_zeros_and_nothing_is_moved_by_more_than_half_a_step(how: Packing) -> None:
    weight = drawn(64, 64)
    weight[3:5] = 0.0
    found = packed(weight, how)()
    assert not found[3:5].any()
    steps = [high - low for low, high in pairwise(TABLE)]
    room = 1.0 + 0.02 * how.use_double_quant  # of a scale that is rounded itself
    for mine, own in zip(found.view(-1, BLOCK), weight.view(-1, BLOCK), strict=True):
        assert (mine - own).abs().max() <= room * max(steps) / 2 * own.abs().max() + 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_gets_the_same_numbers_rounded_to_it(dtype: torch.dtype) -> None:
    weight = drawn(96, 64).to(torch.bfloat16)  # as a file has them
    wide = packed(weight.float(), DOUBLE)()
    found = packed(weight, DOUBLE, dtype)()
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))


@pytest.mark.parametrize("how", [SINGLE, DOUBLE], ids=["single", "double"])
@pytest.mark.parametrize("shape", [*SHAPES, (512, 512)], ids=str)
def test_the_bytes_are_those_that_are_told(how: Packing, shape: tuple[int, int]) -> None:
    found = packed(drawn(*shape), how)
    state: Any = found.state
    kept = [found.codes, state.absmax]
    kept += [state.state2.absmax, state.offset] if how.use_double_quant else []
    numel = math.prod(shape)
    assert sum(tensor.nbytes for tensor in kept) == how.num_bytes(numel)
    if numel >= 1 << 18:
        bits = 4.13 if how.use_double_quant else 4.5
        assert how.num_bytes(numel) * 8 / numel == pytest.approx(bits, abs=0.01)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"^adapter.quantize=nf4 needs .* not installed; run pip install 'tessera-train\[qlora"
    with pytest.raises(ValueError, match=message):
        packing("nf4", use_double_quant=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"quantize": "nf3"}, "adapter.quantize='nf3' is unknown; set it to one of none, nf4"),
        ({"use_double_quant": False}, "use_double_quant=false has no effect without"),
        ({"quantize": "nf4", "use_dora": True}, r"DoRA would start .*; take adapter=lora"),
    ],
)
def test_impossible_settings_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**words)
