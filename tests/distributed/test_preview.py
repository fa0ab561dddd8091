"""Llama-3-8B over 64 ranks, 8 x 8, in one process: shapes, never numbers."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.train import main
from models.llama import LlamaSpec
from tests.runs import tiny_run
from trainer.mesh import MeshSpec
from trainer.preview import lay_out, shards
from trainer.run import Run
from trainer.tasks.causal_lm import CausalLMTask

TOKENS = 8192
LLAMA_3_8B = LlamaSpec(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=TOKENS,
)  # fmt: skip


@pytest.fixture
def run(cache: Path) -> Iterator[Run]:
    mesh = MeshSpec(dp_shard=8, tp=8)
    yield tiny_run(
        cache, model=LLAMA_3_8B, mesh=mesh, precision="bf16", task=CausalLMTask(chunk_tokens=2048)
    )
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 9, 63])
def test_a_rank_of_64_goes_forward_and_backward_on_shards(run: Run, rank: int) -> None:
    laid_out, mesh = lay_out(run, 64, rank)
    (model,) = laid_out.parts
    assert (mesh.rank("dp_shard"), mesh.rank("tp")) == divmod(rank, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_buffers"):
                module.reset_buffers(torch.device("cpu"))
        ids = torch.zeros((1, TOKENS), dtype=torch.int64)
        loss = model(ids, ids, torch.ones_like(ids), ids, torch.ones(()))
        loss.objective.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name  # reduced in fp32
        assert parameter.grad.to_local().shape == parameter.to_local().shape, name


def test_the_ranks_hold_every_weight_once(run: Run) -> None:
    held: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank in range(64):
        laid_out, _ = lay_out(
            replace(run, model=replace(LLAMA_3_8B, num_hidden_layers=1)), 64, rank
        )
        for name, piece in laid_out.pieces().items():
            first, last = piece.columns
            own = sum(len(rows) for rows in piece.rows if rows.is_own)
            held[name] = held.get(name, 0) + own * (last - first)
            shapes[name] = piece.shape
        dist.destroy_process_group()
    assert held == {name: math.prod(shape) for name, shape in shapes.items()}


def test_shards_are_listed_by_kind(run: Run) -> None:
    found = {shard.name: shard for shard in shards(run, 64, rank=9)}
    query = found["model.layers.*.self_attn.q_proj.weight"]
    assert (query.count, query.whole, query.local) == (32, (4096, 4096), (64, 4096))
    down = found["model.layers.*.mlp.down_proj.weight"]
    assert (down.whole, down.local) == ((4096, 14336), (512, 1792))
    assert found["lm_head.weight"].local == (2004, 4096)


def test_a_dry_run_prints_what_a_rank_would_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["experiment=demo", f"runs={tmp_path}", "launch.processes=4", "dry_run=true"]
    assert main([*words, "mesh=single", "mesh.dp_shard=2", "mesh.tp=2"]) == 0
    out = capsys.readouterr().out
    assert "# rank 0 of 4 would hold:" in out
    assert "#   model.layers.*.mlp.down_proj.weight x " in out
