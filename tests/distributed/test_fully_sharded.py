"""Settings of FSDP2 change how much is sent and held, and no number."""

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks.collectives import count, small_demo
from tests.distributed.test_layouts import FSDP, HSDP, curve, slow
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.native import NativeEngine
from trainer.engines.native_trainer import NativeTrainer
from trainer.mesh import MeshSpec
from trainer.parallel.fully_sharded import FullySharded, is_fsdp
from trainer.run import Run
from trainer.verify.layouts import LAYOUTS, NamedLayout
from trainer.verify.rows import MadeRows
from trainer.verify.shrink import Small

BLOCKS, MICRO_BATCHES = 4, 2  # of two ranks
KEPT = FullySharded(reshard_after="backward")
ONCE = FullySharded(reshard_after="step")
AHEAD = FullySharded(prefetch=2)
SPLIT = FullySharded(gradient_sync="micro_batch")
LEAN = FullySharded(reshard_after="step", gradient_sync="micro_batch", prefetch=1)


def with_fsdp(run: Run, fsdp: FullySharded) -> Run:
    return replace(run, engine=replace(run.engine, fsdp=fsdp))


@pytest.mark.parametrize(
    ("fsdp", "precision", "world_size", "mesh"),
    [
        *((fsdp, "bf16", 2, FSDP) for fsdp in (KEPT, ONCE, AHEAD)),
        (ONCE, "fp64", 4, MeshSpec(dp_shard=2, tp=2)),
        *(slow(fsdp, "fp64", 4, HSDP) for fsdp in (KEPT, ONCE, AHEAD)),
    ],
)
def test_keeping_and_prefetching_weights_leaves_every_bit(
    tmp_path: Path, cache: Path, fsdp: FullySharded, precision: str, world_size: int,
    mesh: MeshSpec,
) -> None:  # fmt: skip
    run = tiny_run(cache, precision=precision, max_steps=3, mesh=mesh)
    run_ranks(world_size, train, tmp_path / "plain", run)
    run_ranks(world_size, train, tmp_path / "changed", with_fsdp(run, fsdp))
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "changed", key) == curve(tmp_path / "plain", key)


@pytest.mark.parametrize(
    ("fsdp", "world_size", "mesh"), [(LEAN, 2, FSDP), (SPLIT, 4, HSDP), slow(SPLIT, 2, FSDP)]
)
def test_gradients_reduced_with_each_micro_batch_are_the_same_sums(
    tmp_path: Path, cache: Path, fsdp: FullySharded, world_size: int, mesh: MeshSpec
) -> None:
    run = tiny_run(cache, precision="fp64", max_steps=3, mesh=mesh, data_micro_rows=1)
    run_ranks(1, train, tmp_path / "one", replace(run, mesh=MeshSpec()))
    run_ranks(world_size, train, tmp_path / "many", with_fsdp(run, fsdp))
    for key in ("loss", "grad_norm"):
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "many", key)
        assert found == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.fixture(scope="module")
def small() -> Small:
    return small_demo()


def laid_out_with(fsdp: FullySharded) -> NamedLayout:
    return replace(LAYOUTS["fsdp"], engine=NativeEngine(fsdp=fsdp))


@pytest.mark.parametrize(
    ("fsdp", "gathers", "reduces"),
    [
        (FullySharded(), MICRO_BATCHES * 2 * BLOCKS, BLOCKS + 1),
        (AHEAD, MICRO_BATCHES * 2 * BLOCKS, BLOCKS + 1),
        (KEPT, MICRO_BATCHES * (BLOCKS + 1), BLOCKS + 1),
        (ONCE, BLOCKS + 1, BLOCKS + 1),
        (SPLIT, MICRO_BATCHES * 2 * BLOCKS, MICRO_BATCHES * (BLOCKS + 1)),
    ],
)
def test_as_much_is_sent_as_the_settings_say(
    small: Small, fsdp: FullySharded, gathers: int, reduces: int
) -> None:
    counts = run_ranks(2, count, small, laid_out_with(fsdp))[0].counts
    assert dict(counts) == {"all-reduce": 3, "all-gather": gathers, "reduce-scatter": reduces}


def untied(run: Run) -> Run:
    return replace(run, model=replace(run.model, tie_word_embeddings=False))


def test_an_embedding_and_a_head_that_share_nothing_are_units_of_their_own(small: Small) -> None:
    changed = replace(small, run=untied(small.run))
    counts = run_ranks(2, count, changed, LAYOUTS["fsdp"])[0].counts
    # On top of blocks and root: the head and the embedding, which no backward pass gathers.
    assert counts["all-gather"] == MICRO_BATCHES * (2 * BLOCKS + 2)
    assert counts["reduce-scatter"] == BLOCKS + 3


@pytest.mark.parametrize("fsdp", [FullySharded(), KEPT, ONCE])
def test_untied_ends_have_the_numbers_of_one_process(
    tmp_path: Path, cache: Path, fsdp: FullySharded
) -> None:
    run = untied(tiny_run(cache, precision="fp64", max_steps=3, data_micro_rows=1))
    run_ranks(1, train, tmp_path / "one", replace(run, mesh=MeshSpec()))
    run_ranks(2, train, tmp_path / "many", with_fsdp(replace(run, mesh=FSDP), fsdp))
    for key in ("loss", "grad_norm"):
        expected, found = curve(tmp_path / "one", key), curve(tmp_path / "many", key)
        assert found == pytest.approx(expected, rel=1e-12, abs=0)


def gathered(model: nn.Module) -> int:
    """Return how many elements of weights are there whole."""
    states: list[Any] = [
        group
        for module in model.modules()
        if is_fsdp(module)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    return sum(
        parameter._orig_size.numel()
        for group in states
        if group.is_unsharded
        for parameter in group.fsdp_params
    )


def after_loading(placement: Placement, run: Run) -> tuple[float, int, int]:
    """Evaluate, make every weight 0, evaluate again; return that loss, and what was gathered before
    and behind the change."""
    ranks = Ranks(placement, 60.0)
    mesh = run.mesh.build(ranks=ranks)
    engine = build_engine(run, run.plan_model(), ranks, mesh)
    assert isinstance(engine, NativeTrainer)
    rows = MadeRows(vocab_size=run.model.vocab_size, rows=8, tokens=32, micro_rows=4)
    (batch,) = rows.micro_batches(1, mesh.dp_rank, mesh.dp_size)
    engine.eval_step(batch)
    before = gathered(engine.parts[0])
    for piece in engine.weights().values():
        piece.local.detach().zero_()
    engine.loaded()
    behind = gathered(engine.parts[0])
    loss = engine.eval_step(batch)
    found = float(loss.sum / loss.num_targets)
    ranks.barrier()
    return found, before, behind


@pytest.mark.parametrize("fsdp", [FullySharded(), KEPT, ONCE])
def test_loaded_weights_are_used_though_an_evaluation_had_gathered_old_ones(
    cache: Path, fsdp: FullySharded
) -> None:
    run = with_fsdp(tiny_run(cache, precision="fp64", mesh=FSDP), fsdp)
    total = sum(parameter.numel() for parameter in run.plan_model().parameters())
    for loss, before, behind in run_ranks(2, after_loading, run):
        assert loss == pytest.approx(log(run.model.vocab_size), rel=1e-12)
        assert behind == 0
        assert 0 < before <= total
        assert (before == total) == (fsdp != FullySharded())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reshard_after": "never"}, "is unknown; set it to one of forward, backward, step"),
        ({"gradient_sync": "often"}, "is unknown; set it to one of step, micro_batch"),
        ({"prefetch": -1}, "prefetch=-1 is negative"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullySharded(**settings)


@pytest.mark.parametrize(
    ("fsdp", "mesh", "message"),
    [
        (KEPT, MeshSpec(dp_replicate=2), "reshard_after=backward has no effect on mesh.dp_shard=1"),
        (AHEAD, MeshSpec(tp=2), "prefetch=2 has no effect on mesh.dp_shard=1; set mesh=fsdp"),
        (SPLIT, MeshSpec(dp_shard=2, pp=2), "gradient_sync=micro_batch is for torch's pipeline"),
    ],
)
def test_settings_without_effect_are_refused_before_the_start(
    cache: Path, fsdp: FullySharded, mesh: MeshSpec, message: str
) -> None:
    run = with_fsdp(tiny_run(cache, mesh=mesh), fsdp)
    with pytest.raises(ValueError, match=message):
        run.check(2 if mesh.lengths["pp"] == 1 else 4)
