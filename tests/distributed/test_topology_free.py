"""`deterministic=topology_free`: whole runs on 1, 2 and 4 ranks are equal in every bit."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_spec
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train
from trainer.distributed import Placement, Ranks
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.native import NativeEngine
from trainer.freeze import FreezeSpec
from trainer.mesh import MeshSpec
from trainer.optim import SGD, AdamW, OptimSpec
from trainer.optimizers.rules import Rules
from trainer.parallel.activation_checkpointing import ActivationCheckpointing
from trainer.parallel.fully_sharded import FullySharded
from trainer.parallel.tree import TreeSum, pairwise_sum, row_square_sum, summed_share
from trainer.pieces import Piece, Rows
from trainer.record import read_lines
from trainer.run import Run

DDP, FSDP = MeshSpec(dp_replicate=-1), MeshSpec(dp_shard=-1)
HSDP = MeshSpec(dp_replicate=2, dp_shard=2)
LAYOUTS = [(2, DDP), (2, FSDP), (4, DDP), (4, FSDP), (4, HSDP)]
# One key head of two: on 4 ranks, FSDP2 leaves some shards of its weights empty.
DROPOUT = tiny_spec(attention_dropout=0.2, num_key_value_heads=1, head_dim=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache apart: other tests look into the common one."""
    return tmp_path_factory.mktemp("tokens")


def free_run(cache: Path, **changes: Any) -> Run:
    """Twelve micro-batches in a step: three rounds on 4 ranks, which fill no binary tree."""
    settings = {
        "deterministic": "topology_free", "model": DROPOUT, "optim": AdamW(lr=3e-2),
        "data_global_rows": 12, "data_micro_rows": 1, "data_eval_fraction": 0.003,
        "max_steps": 6, "eval_every": 3,
    }  # fmt: skip
    return tiny_run(cache, **(settings | changes))


def outcome(folder: Path) -> tuple[list[Any], list[bytes]]:
    """Return every number of the metrics that no clock made, and the bytes of the last weights."""
    timed = ("tokens_per_second", "data_wait_fraction", "memory_gib", "time")
    lines = read_lines(folder / "metrics.jsonl")
    numbers = [{k: v for k, v in line.items() if k not in timed} for line in lines]
    last = max(folder.glob("checkpoints/step_*"))
    return numbers, [path.read_bytes() for path in sorted(last.rglob("*.safetensors"))]


CASES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16, recomputed": {
        "precision": "bf16",
        "engine": NativeEngine(activation_checkpointing=ActivationCheckpointing(mode="full")),
    },
    "frozen parts, SGD, offloaded": {
        "freeze": FreezeSpec(frozen=("model.embed_tokens.*", "model.layers.0.mlp.*")),
        "optim": SGD(lr=0.3, max_grad_norm=0.5),
        "engine": NativeEngine(offload_optimizer=True),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        ("fp32", LAYOUTS),
        ("bf16, recomputed", [(2, FSDP), (4, DDP)]),
        ("frozen parts, SGD, offloaded", [(2, DDP), (4, HSDP)]),
    ],
    ids=list(CASES),
)
def test_runs_are_equal_in_every_bit_on_every_layout(
    tmp_path: Path, cache: Path, case: str, layouts: list[tuple[int, MeshSpec]]
) -> None:
    run = free_run(cache, **CASES[case])
    run_ranks(1, train, tmp_path / "one", run)
    expected = outcome(tmp_path / "one")
    assert len(expected[0]) == 8
    for number, (world_size, mesh) in enumerate(layouts):
        folder = tmp_path / str(number)
        run_ranks(world_size, train, folder, replace(run, mesh=mesh))
        assert outcome(folder) == expected, (world_size, mesh)


def test_without_it_four_ranks_differ_in_some_bit(tmp_path: Path, cache: Path) -> None:
    run = free_run(cache, deterministic="off")
    run_ranks(1, train, tmp_path / "one", run)
    run_ranks(4, train, tmp_path / "four", run)
    assert outcome(tmp_path / "four") != outcome(tmp_path / "one")


def test_a_run_that_changes_its_ranks_twice_equals_one_that_never_did(
    tmp_path: Path, cache: Path
) -> None:
    run = free_run(cache)
    run_ranks(1, train, tmp_path / "one", run)
    for world_size, mesh, stop in ((4, DDP, 2), (2, FSDP, 4), (1, DDP, 6)):
        part = replace(run, mesh=mesh, max_steps=stop)
        run_ranks(world_size, train, tmp_path / "many", part)
    numbers, weights = outcome(tmp_path / "many")
    expected, expected_weights = outcome(tmp_path / "one")
    assert weights == expected_weights
    # Each part evaluates at its end too.
    assert [n for n in numbers if n["split"] == "train"] == [
        n for n in expected if n["split"] == "train"
    ]
    assert all(line in numbers for line in expected)


def test_zeros_behind_the_values_do_not_change_their_sum() -> None:
    values = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for zeros in range(9):
        padded = torch.cat((values, torch.zeros(zeros, dtype=torch.float64)))
        assert torch.equal(pairwise_sum(padded), pairwise_sum(values))


@pytest.mark.parametrize("count", [1, 2, 8, 12, 16, 20, 24, 28, 56])
def test_the_sum_does_not_show_how_many_ranks_computed_its_leaves(count: int) -> None:
    leaves = torch.randn(count, 33, generator=torch.Generator().manual_seed(count))
    sums = []
    for ranks in (1, 2, 4, 8):
        if count % ranks == 0:
            tree = TreeSum()
            for first in range(0, count, ranks):
                tree.push([by_halves(leaves[first : first + ranks])])
            sums.append(tree.total()[0])
    for found in sums:
        assert torch.equal(found, sums[0])
        torch.testing.assert_close(found, leaves.sum(0))


def by_halves(leaves: Tensor) -> Tensor:
    """Add up a power of two of tensors, the slow and obvious way."""
    if len(leaves) == 1:
        return leaves[0].clone()
    half = len(leaves) // 2
    return by_halves(leaves[:half]) + by_halves(leaves[half:])


def exchanged(placement: Placement) -> tuple[list[float], list[list[float]]]:
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = DDP.build(ranks=ranks)
    generator = torch.Generator().manual_seed(placement.rank)
    own = torch.randn(8, generator=generator)
    share = summed_share(own, mesh.token_group)
    return share.tolist(), mesh.in_order(own.view(4, 2)).tolist()


def test_ranks_add_pairwise_and_stand_in_the_order_of_their_rounds() -> None:
    found = run_ranks(4, exchanged)
    owns = torch.stack(
        [torch.randn(8, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    )
    assert [x for share, _ in found for x in share] == by_halves(owns).tolist()
    for _, ordered in found:
        assert ordered == owns.view(4, 4, 2).movedim(0, 1).flatten(0, 1).tolist()


def test_the_norm_is_that_of_the_whole_wherever_it_is_cut() -> None:
    whole = torch.randn(7, 1001, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    expected = row_square_sum([(Piece.of(whole), whole)], None, device)
    assert float(expected) == pytest.approx(float(whole.double().square().sum()), rel=1e-14)
    rows = []
    for start, stop in ((0, 1), (1, 5), (5, 7)):
        piece = Piece(
            local=whole[start:stop], shape=(7, 1001), columns=(0, 1001),
            rows=(Rows(start=start, stop=stop),),
        )  # fmt: skip
        rows.append(torch.linalg.vector_norm(piece.local.clone(), dim=1, dtype=torch.float64))
    assert float(torch.cat(rows).square().sum()) == float(expected)


@pytest.mark.parametrize("optim", [AdamW(lr=1e-2), SGD(lr=1e-2, weight_decay=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plain_update_of_a_part_is_the_part_of_the_update(
    optim: OptimSpec, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = torch.randn(4, 999, 3, generator=generator).to(dtype)
    whole = updated(optim, weight, gradients)
    cuts = (0, 1, 4, 15, 16, 300, 301, 777, 999)
    parts = [
        updated(optim, weight[a:b], [gradient[a:b] for gradient in gradients])
        for a, b in pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


def updated(optim: OptimSpec, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    from trainer.engines.update import _without_fused_kernels

    weight = weight.clone()
    optimizer = optim.build(pieces={"w": Piece.of(weight)}, rules=Rules())
    _without_fused_kernels(optimizer)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (2, {"mesh": MeshSpec(tp=2)}, r"mesh.tp=2 cuts products .* set mesh.tp=1, or determ"),
        (3, {}, r"which 3 data ranks do not make; start 1, 2, 4, 8"),
        (8, {"mesh": MeshSpec(dp_replicate=4, dp_shard=2), "data_global_rows": 8},
         r"set mesh.dp_replicate to 1 or 2"),
        (2, {"data_micro_rows": None}, r"one size on every number of ranks; set data.micro_rows"),
        (2, {"precision": "pure_bf16"}, r"rounds the last elements of a tensor otherwise; set pre"),
        (2, {"engine": NativeEngine(fsdp=FullySharded(gradient_sync="micro_batch")), "mesh": FSDP},
         r"gradient_sync=micro_batch has no effect with deterministic=topology_free, .* leave"),
        (2, {"engine": DeepSpeedEngine()}, r"set engine=native, or deterministic=off"),
        (2, {"engine": AccelerateEngine()}, r"set engine=native, or deterministic=off"),
    ],
)  # fmt: skip
def test_what_cannot_be_equal_is_refused(
    cache: Path, ranks: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        free_run(cache, **changes).check(ranks)


def test_an_unknown_mode_is_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"deterministic='on' is unknown; set it to one of off"):
        free_run(cache, deterministic="on")
