"""The same losses, gradients and weights on every layout: the promise that all else stands on."""

from dataclasses import replace
from functools import cache as memo
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.callbacks.closing import Closing
from trainer.mesh import MeshSpec
from trainer.record import read_lines
from trainer.run import Run

DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
HSDP = MeshSpec(dp_replicate=2, dp_shard=2)
DATA = [(2, DDP), (2, FSDP), (4, DDP), (4, FSDP), (4, HSDP)]
SPLIT = [
    (2, MeshSpec(tp=2)),
    (2, MeshSpec(cp=2)),
    (2, MeshSpec(pp=2)),
    (4, MeshSpec(dp_shard=2, tp=2)),
    (4, MeshSpec(dp_replicate=2, pp=2)),
    (4, MeshSpec(cp=2, tp=2)),
]


def slow(*values: Any) -> Any:
    """Return a case that the slow command runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"]


def eval_losses(folder: Path) -> list[float]:
    return [
        line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "eval"
    ]


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache apart: other tests look into the common one."""
    return tmp_path_factory.mktemp("tokens")


@memo
def one_process(folder: Path, cache: Path, precision: str, max_steps: int) -> Path:
    """Train the reference of several tests once; return its folder."""
    folder = folder / f"one-{precision}-{max_steps}"
    run_ranks(1, train, folder, tiny_run(cache, precision=precision, max_steps=max_steps))
    return folder


@pytest.mark.parametrize(
    ("precision", "tolerance", "world_size", "mesh"),
    [
        *(("fp64", 1e-12, *layout) for layout in [*DATA, *SPLIT]),
        *(("fp32", 1e-6, *layout) for layout in [(4, HSDP), SPLIT[3]]),
        *(slow("fp32", 1e-6, *layout) for layout in [*DATA[:-1], *SPLIT[:3], *SPLIT[4:]]),
    ],
)
def test_losses_and_norms_equal_those_of_one_process(
    tmp_path: Path, own_cache: Path, precision: str, tolerance: float, world_size: int,
    mesh: MeshSpec,
) -> None:  # fmt: skip
    one = one_process(own_cache.parent, own_cache, precision, 5)
    many = tiny_run(own_cache, mesh=mesh, precision=precision, max_steps=5)
    run_ranks(world_size, train, tmp_path / "many", many)
    for key in ("loss", "grad_norm"):
        expected, found = curve(one, key), curve(tmp_path / "many", key)
        assert len(expected) == 5
        assert found == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [(2, FSDP), *SPLIT[:4], *(slow(*layout) for layout in [(4, HSDP), *SPLIT[4:]])],
)
def test_in_bf16_masters_stay_fp32_and_losses_differ_by_roundings_of_bf16_alone(
    tmp_path: Path, own_cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    one = one_process(own_cache.parent, own_cache, "bf16", 3)
    many = tiny_run(own_cache, precision="bf16", max_steps=3, mesh=mesh)
    run_ranks(world_size, train, tmp_path / "many", many)
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):
        expected, found = curve(one, key), curve(tmp_path / "many", key)
        assert found == pytest.approx(expected, rel=tolerance, abs=0)
    saved = tmp_path / "many" / "checkpoints" / "step_00000003"
    for file in saved.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118


@memo
def evaluated(folder: Path, cache: Path) -> tuple[Run, Path]:
    """Train one process that evaluates; return its run and its folder."""
    text = folder / "held_out.txt"
    text.write_text("\n".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(20)))
    settings: dict[str, Any] = {
        "precision": "fp64", "eval_every": 2, "save_every": 4, "data_eval_path": str(text),
        "callbacks": {"closing": Closing(prompt="def f", sample_tokens=5)},
    }  # fmt: skip
    run = tiny_run(cache, **settings)
    run_ranks(1, train, folder / "evaluated", run)
    return run, folder / "evaluated"


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [*SPLIT[1:5], *(slow(*layout) for layout in (SPLIT[0], SPLIT[5]))],
)
def test_evaluation_and_resume_on_a_split_model_equal_one_process(
    tmp_path: Path, own_cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    one, folder = evaluated(own_cache.parent, own_cache)
    many = replace(one, mesh=mesh)
    run_ranks(world_size, train, tmp_path / "many", replace(many, max_steps=4))
    run_ranks(world_size, train, tmp_path / "many", many)
    for key in ("loss", "grad_norm"):
        expected = curve(folder, key)
        assert curve(tmp_path / "many", key) == pytest.approx(expected, rel=1e-10, abs=0)
    expected, found = (eval_losses(name) for name in (folder, tmp_path / "many"))
    assert len(expected) == 5
    assert found == pytest.approx(expected, rel=1e-10, abs=0)
