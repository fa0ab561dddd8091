"""Optimizers of our own: the numbers of one process on every layout, and exact resume."""

from dataclasses import replace
from functools import cache as memo
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from models.gpt_bigcode import GPTBigCodeSpec
from tests.conftest import tiny_spec
from tests.distributed.test_layouts import DDP, FSDP, HSDP, curve, slow
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.freeze import FreezeSpec, Group
from trainer.mesh import MeshSpec
from trainer.muon import Muon
from trainer.optim import AdamW
from trainer.run import Run

# Wide enough that state is kept in 8 bits, and that two ranks cut no block of it.
WIDE = tiny_spec(hidden_size=512, intermediate_size=512, num_hidden_layers=2)
BIGCODE = GPTBigCodeSpec(
    vocab_size=258, n_embd=16, n_layer=2, n_head=4, n_positions=64,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
OPTIMS: dict[str, dict[str, Any]] = {
    "muon": {"optim": Muon(lr=1e-2)},
    "muon on fused projections": {"optim": Muon(lr=1e-2), "model": BIGCODE},
    "8bit": {"optim": AdamW(lr=1e-3, states="8bit"), "model": WIDE},
    "bf16": {"optim": AdamW(lr=1e-2, states="bf16")},
}
TP, PP = MeshSpec(tp=2), MeshSpec(pp=2)
STEPS = 4


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def run_of(cache: Path, name: str, **changes: Any) -> Run:
    settings = {"precision": "fp64", "max_steps": STEPS, "save_every": 2, **OPTIMS[name]}
    return tiny_run(cache, **(settings | changes))


@memo
def one_process(cache: Path, name: str) -> Path:
    folder = cache.parent / f"one {name}"
    run_ranks(1, train, folder, run_of(cache, name))
    return folder


@pytest.mark.parametrize(
    ("name", "world_size", "mesh"),
    [
        ("muon", 2, DDP), ("muon", 2, FSDP), ("muon", 2, TP), ("muon", 2, PP),
        slow("muon", 4, HSDP), slow("muon", 4, MeshSpec(dp_shard=2, tp=2)),
        slow("muon", 4, MeshSpec(dp_replicate=2, cp=2)),
        ("muon on fused projections", 2, TP), slow("muon on fused projections", 2, FSDP),
        ("8bit", 2, FSDP), ("8bit", 2, TP), slow("8bit", 2, DDP), slow("8bit", 2, PP),
        ("bf16", 2, FSDP), slow("bf16", 2, TP),
    ],
)  # fmt: skip
def test_losses_weights_and_state_equal_those_of_one_process(
    tmp_path: Path, own_cache: Path, name: str, world_size: int, mesh: MeshSpec
) -> None:
    one = one_process(own_cache, name)
    run_ranks(world_size, train, tmp_path / "many", run_of(own_cache, name, mesh=mesh))
    for key in ("loss", "grad_norm"):
        expected = curve(one, key)
        assert len(expected) == STEPS
        assert curve(tmp_path / "many", key) == pytest.approx(expected, rel=1e-12, abs=0)
    found, expected = (tensors(folder, STEPS) for folder in (tmp_path / "many", one))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        difference = (found[key].double() - value.double()).abs().max()
        assert float(difference) <= 1e-10 * float(value.double().abs().max()), key


@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("precision", ["pure_bf16", "bf16"])
def test_a_resumed_run_has_every_bit_of_one_that_never_stopped(
    tmp_path: Path, own_cache: Path, name: str, precision: str
) -> None:
    run = run_of(own_cache, name, precision=precision, mesh=FSDP, deterministic="run")
    run_ranks(2, train, tmp_path / "whole", run)
    run_ranks(2, train, tmp_path / "parts", replace(run, max_steps=2))
    run_ranks(2, train, tmp_path / "parts", run)
    found, expected = (tensors(tmp_path / part, STEPS) for part in ("parts", "whole"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].equal(value), key


@pytest.mark.parametrize("name", ["muon", "8bit"])
def test_another_number_of_ranks_goes_on_from_the_same_state(
    tmp_path: Path, own_cache: Path, name: str
) -> None:
    one = one_process(own_cache, name)
    run = run_of(own_cache, name, mesh=FSDP)
    run_ranks(2, train, tmp_path, replace(run, max_steps=2))
    run_ranks(1, train, tmp_path, run)
    assert curve(tmp_path) == pytest.approx(curve(one), rel=1e-12, abs=0)


def test_matrices_that_join_later_are_moved_by_muon(tmp_path: Path, own_cache: Path) -> None:
    freeze = FreezeSpec(groups={"mlp": Group(names=("*.mlp.*",), unfreeze_at=2)})
    for part, ranks, mesh in (("one", 1, DDP), ("many", 2, FSDP)):
        run = run_of(own_cache, "muon", freeze=freeze, mesh=mesh)
        run_ranks(ranks, train, tmp_path / part, run)
    assert curve(tmp_path / "many") == pytest.approx(curve(tmp_path / "one"), rel=1e-12, abs=0)
    before, after = (tensors(tmp_path / "many", step) for step in (2, STEPS))
    joined = "momentum_buffer/model.layers.0.mlp.up_proj.weight"
    assert joined not in before
    assert after[joined].any()


@pytest.mark.parametrize("name", ["muon", "8bit", "bf16"])
def test_deepspeed_is_refused(own_cache: Path, name: str) -> None:
    run = run_of(own_cache, name, engine=DeepSpeedEngine(stage=1), precision="fp32")
    with pytest.raises(ValueError, match="or use engine=native"):
        run.check(2)


def test_a_cut_through_blocks_of_8_bits_is_refused(own_cache: Path) -> None:
    narrow = replace(WIDE, hidden_size=256, intermediate_size=512)
    with pytest.raises(ValueError, match=r"mesh.tp=2 cuts the 256 of .* into parts of 128"):
        run_of(own_cache, "8bit", model=narrow, mesh=TP).check(2)


def tensors(folder: Path, step: int) -> dict[str, Any]:
    """Return weights and optimizer state of a checkpoint."""
    files = sorted((folder / f"checkpoints/step_{step:08d}").rglob("*.safetensors"))
    assert len(files) == 2
    return {name: value for file in files for name, value in load_file(file).items()}
