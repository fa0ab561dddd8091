"""Recomputing blocks change no number on any layout, and really compute again."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parity.oracle import built, inputs, specs
from tests.distributed.test_layouts import DDP, FSDP, curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.native import NativeEngine
from trainer.mesh import MeshSpec
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.data_parallel import named_blocks


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
    for mode, every in (("full", 1), ("full", 2), ("selective", 1)):
        engine = NativeEngine(
            activation_checkpointing=ActivationCheckpointing(mode=mode, every=every)
        )
        folder = tmp_path / f"{mode}{every}"
        run_ranks(world_size, train, folder, tiny_run(cache, engine=engine, **settings))
        for key in ("loss", "grad_norm"):
            assert curve(folder, key) == curve(plain, key), (mode, every)


@pytest.mark.parametrize("family", list(specs()))
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_of_every_family_with_dropout_are_the_same(family: str, mode: str) -> None:
    found = {}
    for each in ("none", mode):
        spec = specs()[family]
        model = built(spec).train()
        for module in model.modules():
            if getattr(module, "dropout", None) == 0.0:
                module.dropout = 0.2
        ActivationCheckpointing(mode=each).apply(
            list(dict(named_blocks(model, spec.layout)).values())
        )
        torch.manual_seed(0)
        model(**inputs(spec)).square().sum().backward()
        found[each] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["none"].keys() == found[mode].keys()
    for name, gradient in found["none"].items():
        assert torch.equal(found[mode][name], gradient), name


class _Count(TorchDispatchMode):
    """Counts the operators that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "every", "silus", "products"),
    # Llama: 2 blocks of 7 linears and the head, three products each. A second forward pass ends
    # with the last thing that is needed: the output of down_proj is not.
    [("none", 1, 2, 45), ("full", 1, 4, 57), ("full", 2, 3, 51), ("selective", 1, 4, 45)],
)
def test_as_much_is_computed_again_as_the_mode_says(
    mode: str, every: int, silus: int, products: int
) -> None:
    spec = specs()["Llama"]
    model = built(spec)
    ActivationCheckpointing(mode=mode, every=every).apply(
        list(dict(named_blocks(model, spec.layout)).values())
    )
    batch = inputs(spec)
    with _Count() as count:
        model(**batch).sum().backward()
    assert count.calls["silu"] == silus
    assert count.calls["mm"] == products


def test_names_stay_and_nothing_is_recomputed_without_gradients() -> None:
    spec = specs()["Llama"]
    model = built(spec)
    names = [name for name, _ in model.named_modules()]
    ActivationCheckpointing(mode="full").apply(
        list(dict(named_blocks(model, spec.layout)).values())
    )
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad(), _Count() as count:
        model(**inputs(spec))
    assert count.calls["silu"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "some"}, "mode='some' is unknown; set it to one of none, full, selective"),
        ({"mode": "full", "every": 0}, "every=0 is not positive"),
        ({"every": 2}, "every=2 has no effect"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointing(**settings)
