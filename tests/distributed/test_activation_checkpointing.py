"""Recomputing blocks change no number on any layout, and really compute again."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parity.oracle import built, inputs, specs
from models.nn.runs import TILE, Runs
from models.nn.varlen import Varlen
from tests.distributed.test_layouts import DDP, FSDP, curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.parallel.activation_checkpointing import SELECTIVE_SHARE, ActivationCheckpointing
from trainer.parallel.data_parallel import named_blocks

FULL, SELECTIVE = (ActivationCheckpointing(mode=mode) for mode in ("full", "selective"))
HALF = ActivationCheckpointing(mode="full", every=2)
MIXED = ActivationCheckpointing(mode="budget", budget=0.4)  # of two blocks one full, one selective


@pytest.mark.parametrize(
    ("precision", "world_size", "mesh"),
    [
        # bf16 has casts to repeat; of one process both, since what differs is in the blocks.
        ("fp64", 1, MeshSpec()), ("bf16", 1, MeshSpec()), ("bf16", 2, FSDP),
        *(pytest.param(*rest, marks=pytest.mark.slow)
          for rest in (("bf16", 2, DDP), ("fp64", 2, DDP), ("fp64", 2, FSDP))),
    ],
)  # fmt: skip
def test_losses_and_norms_are_bit_for_bit_the_same(
    tmp_path: Path, cache: Path, precision: str, world_size: int, mesh: MeshSpec
) -> None:
    settings: dict[str, Any] = {"precision": precision, "max_steps": 4, "mesh": mesh}
    plain = tmp_path / "none"
    run_ranks(world_size, train, plain, tiny_run(cache, **settings))
    for number, recompute in enumerate((FULL, HALF, SELECTIVE, MIXED)):
        engine = NativeEngine(activation_checkpointing=recompute)
        folder = tmp_path / str(number)
        run_ranks(world_size, train, folder, tiny_run(cache, engine=engine, **settings))
        for key in ("loss", "grad_norm"):
            assert curve(folder, key) == curve(plain, key), recompute


@pytest.mark.parametrize("family", list(specs()))
@pytest.mark.parametrize("recompute", [FULL, SELECTIVE, MIXED], ids=lambda each: each.mode)
def test_gradients_of_every_family_with_dropout_are_the_same(
    family: str, recompute: ActivationCheckpointing
) -> None:
    found = {}
    for each in (ActivationCheckpointing(), recompute):
        spec = specs()[family]
        model = built(spec).train()
        for module in model.modules():
            if getattr(module, "dropout", None) == 0.0:
                module.dropout = 0.2
        each.apply(list(dict(named_blocks(model, spec.layout)).values()))
        torch.manual_seed(0)
        model(**inputs(spec)).square().sum().backward()
        found[each.mode] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["none"].keys() == found[recompute.mode].keys()
    for name, gradient in found["none"].items():
        assert torch.equal(found[recompute.mode][name], gradient), name


class _Count(TorchDispatchMode):
    """Counts the operators that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("recompute", "silus", "products"),
    # Llama: 2 blocks of 7 linears and the head, three products each. A second forward pass ends
    # with the last thing that is needed: the output of down_proj is not.
    [
        (ActivationCheckpointing(), 2, 45), (FULL, 4, 57), (HALF, 3, 51), (SELECTIVE, 4, 45),
        *((ActivationCheckpointing(mode="budget", budget=budget), *counts) for budget, counts in (
            (0.0, (4, 57)), (0.4, (4, 51)), (0.7, (4, 45)), (0.9, (3, 45)),
        )),
    ],
)  # fmt: skip
def test_as_much_is_computed_again_as_the_mode_says(
    recompute: ActivationCheckpointing, silus: int, products: int
) -> None:
    spec = specs()["Llama"]
    model = built(spec)
    recompute.apply(list(dict(named_blocks(model, spec.layout)).values()))
    batch = inputs(spec)
    with _Count() as count:
        model(**batch).sum().backward()
    assert count.calls["silu"] == silus
    assert count.calls["mm"] == products


class Mixing(torch.nn.Module):
    """A block that is attention by lengths: two documents."""

    def forward(self, x_BNTH: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([0, 4, 8], dtype=torch.int32, device="meta")
        runs = Runs(cu_query=starts, cu_key=starts, max_query=TILE, max_key=TILE, causal=True)
        mixed = Varlen().attend(x_BNTH, x_BNTH, x_BNTH, runs, dropout=0.0, scale=1.0)
        return torch.nn.functional.silu(mixed).sin()


@pytest.mark.parametrize(("recompute", "attentions"), [(FULL, 2), (SELECTIVE, 1)])
def test_attention_by_lengths_is_not_computed_again(
    recompute: ActivationCheckpointing, attentions: int
) -> None:
    """On `meta`, where the operation has shapes: its kernel is for CUDA alone."""
    block = Mixing()
    recompute.apply([block])
    x = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with _Count() as count:
        block(x).sum().backward()
    assert count.calls["silu"] == 2
    assert count.calls["_varlen_attn"] == attentions


def test_a_budget_is_spread_over_blocks_and_never_exceeded() -> None:
    for num_blocks in (1, 2, 7, 32):
        kept = []
        for budget in range(100):
            modes = ActivationCheckpointing(mode="budget", budget=budget / 100).modes(num_blocks)
            assert len(modes) == num_blocks
            assert len(set(modes)) <= 2
            shares = {"full": 0.0, "selective": SELECTIVE_SHARE, "none": 1.0}
            kept.append(sum(shares[mode] for mode in modes) / num_blocks)
            assert kept[-1] <= budget / 100 + 1e-9
            # One more block that keeps more would be too much.
            assert kept[-1] + SELECTIVE_SHARE / num_blocks > budget / 100
        assert kept == sorted(kept)
    modes = ActivationCheckpointing(mode="budget", budget=0.25).modes(10)
    assert [n for n, mode in enumerate(modes) if mode == "selective"] == [2, 4, 7, 9]
    assert modes.count("full") == 6


def test_names_stay_and_nothing_is_recomputed_without_gradients() -> None:
    spec = specs()["Llama"]
    model = built(spec)
    names = [name for name, _ in model.named_modules()]
    FULL.apply(list(dict(named_blocks(model, spec.layout)).values()))
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad(), _Count() as count:
        model(**inputs(spec))
    assert count.calls["silu"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "some"}, "mode='some' is unknown; set it to one of none, full, selective, bud"),
        ({"mode": "full", "every": 0}, "every=0 is not positive"),
        ({"every": 2}, "every=2 has no effect"),
        ({"mode": "budget", "budget": 0.5, "every": 2}, "every=2 has no effect"),
        ({"mode": "full", "budget": 0.5}, r"budget=0.5 has no effect; set .*mode=budget"),
        ({"mode": "budget"}, r"found .*budget=None; set it to 0 or more and below 1, as 0.5"),
        ({"mode": "budget", "budget": 1.0}, r"found .*budget=1.0; set it to 0 or more and below"),
        ({"mode": "budget", "budget": -0.1}, r"found .*budget=-0.1; set it to 0 or more"),
        ({"mode": "budget", "budget": math.nan}, r"found .*budget=nan; set it to 0 or more"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointing(**settings)
