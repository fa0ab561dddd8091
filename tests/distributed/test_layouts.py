"""The same losses, gradients and weights on every layout: the promise that all else stands on."""

from dataclasses import replace
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

DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
HSDP = MeshSpec(dp_replicate=2, dp_shard=2)
SPLIT = [
    (2, MeshSpec(tp=2)),
    (2, MeshSpec(cp=2)),
    (2, MeshSpec(pp=2)),
    (4, MeshSpec(dp_shard=2, tp=2)),
    (4, MeshSpec(dp_replicate=2, pp=2)),
    (4, MeshSpec(cp=2, tp=2)),
]


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"]


def eval_losses(folder: Path) -> list[float]:
    return [
        line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["split"] == "eval"
    ]


@pytest.mark.parametrize(
    ("world_size", "mesh"), [(2, DDP), (2, FSDP), (4, DDP), (4, FSDP), (4, HSDP), *SPLIT]
)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6)])
def test_losses_and_norms_equal_those_of_one_process(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec, precision: str, tolerance: float
) -> None:
    changes = {"precision": precision, "max_steps": 5}
    run_ranks(1, train, tmp_path / "one", tiny_run(cache, **changes))
    run_ranks(world_size, train, tmp_path / "many", tiny_run(cache, mesh=mesh, **changes))
    for key in ("loss", "grad_norm"):
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "many", key)
        assert len(expected) == 5
        assert found == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize(("world_size", "mesh"), [(2, FSDP), (4, HSDP), *SPLIT])
def test_in_bf16_masters_stay_fp32_and_losses_differ_by_roundings_of_bf16_alone(
    tmp_path: Path, cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    run = tiny_run(cache, precision="bf16", max_steps=3)
    run_ranks(1, train, tmp_path / "one", run)
    run_ranks(world_size, train, tmp_path / "many", replace(run, mesh=mesh))
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "many", key)
        assert found == pytest.approx(expected, rel=tolerance, abs=0)
    saved = tmp_path / "many" / "checkpoints" / "step_00000003"
    for file in saved.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache apart: other tests look into the common one."""
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize(("world_size", "mesh"), SPLIT)
def test_evaluation_and_resume_on_a_split_model_equal_one_process(
    tmp_path: Path, own_cache: Path, world_size: int, mesh: MeshSpec
) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("\n".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(20)))
    settings: dict[str, Any] = {
        "precision": "fp64", "eval_every": 2, "save_every": 4, "data_eval_path": str(text),
        "callbacks": {"closing": Closing(prompt="def f", sample_tokens=5)},
    }  # fmt: skip
    one = tiny_run(own_cache, **settings)
    run_ranks(1, train, tmp_path / "one", one)
    many = replace(one, mesh=mesh)
    run_ranks(world_size, train, tmp_path / "many", replace(many, max_steps=4))
    run_ranks(world_size, train, tmp_path / "many", many)
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "one", key)
        assert curve(tmp_path / "many", key) == pytest.approx(expected, rel=1e-10, abs=0)
    expected, found = (eval_losses(tmp_path / name) for name in ("one", "many"))
    assert len(expected) == 5
    assert found == pytest.approx(expected, rel=1e-10, abs=0)
