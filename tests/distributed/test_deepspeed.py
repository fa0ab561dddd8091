"""The deepspeed engine in a real run: curves, evaluation, resume on other engines, refusals."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.binding import bind
from tests.conftest import tiny_spec
from tests.distributed.test_layouts import curve
from tests.ranks import COLLECTIVE_SECONDS, run_ranks
from tests.runs import tiny_run, train
from trainer.callbacks.closing import Closing
from trainer.construct import build_engine
from trainer.distributed import Placement, Ranks
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.freeze import FreezeSpec
from trainer.mesh import MeshSpec
from trainer.optim import SGD
from trainer.parallel.materialise import materialise, random_values
from trainer.run import Run
from trainer.verify.rows import MadeRows

import_deepspeed("cpu")  # once, not in every rank


def with_frozen_part(cache: Path) -> Run:
    return tiny_run(
        cache, save_every=2, freeze=FreezeSpec(frozen=("model.layers.0.mlp.*",)), max_steps=6,
        callbacks={"closing": Closing(prompt="def f", sample_tokens=3)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def native_curve(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("native") / "one"
    run_ranks(1, train, folder, with_frozen_part(cache))
    return {key: curve(folder, key) for key in ("loss", "grad_norm")}


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        *((stage, MeshSpec(dp_replicate=2)) for stage in (0, 1, 2, 3)),
        (0, MeshSpec(tp=2)),
        (3, MeshSpec(tp=2)),
        (2, MeshSpec(cp=2)),
    ],
)
def test_a_run_goes_on_between_deepspeed_and_native_with_the_same_curve(
    tmp_path: Path, cache: Path, native_curve: dict[str, list[float]], stage: int, mesh: MeshSpec
) -> None:
    native = with_frozen_part(cache)
    zero = replace(native, engine=DeepSpeedEngine(stage=stage), mesh=mesh)
    run_ranks(2, train, tmp_path, replace(zero, max_steps=2))
    run_ranks(1, train, tmp_path, replace(native, max_steps=4))
    run_ranks(2, train, tmp_path, zero)
    for key, expected in native_curve.items():
        assert len(expected) == 6
        assert curve(tmp_path, key) == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [(1, MeshSpec(dp_replicate=2)), (3, MeshSpec(dp_replicate=2)), (2, MeshSpec(tp=2))],
)
def test_bf16_starts_from_and_saves_fp32_masters(
    tmp_path: Path, cache: Path, stage: int, mesh: MeshSpec
) -> None:
    native = tiny_run(cache, precision="bf16", max_steps=3, save_every=1)
    run_ranks(1, train, tmp_path / "one", native)
    zero = replace(native, engine=DeepSpeedEngine(stage=stage), mesh=mesh, max_steps=2)
    run_ranks(2, train, tmp_path / "many", zero)
    run_ranks(1, train, tmp_path / "many", native)
    for key in ("loss", "grad_norm"):
        expected = curve(tmp_path / "one", key)
        assert curve(tmp_path / "many", key) == pytest.approx(expected, rel=1e-2, abs=0)


def own_losses(placement: Placement, run: Run, rows: MadeRows) -> list[float]:
    """Return the losses of two steps on the same rows by the engine of `run`."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    mesh = run.mesh.build(ranks=ranks)
    engine = build_engine(run, run.plan_model(), ranks, mesh)
    losses = []
    for step in (1, 2):
        batches = rows.micro_batches(1, mesh.dp_rank, mesh.dp_size)
        result = engine.train_step(step, batches, rows.num_tokens(batches))
        losses.append(float(result.loss_sum / result.num_targets))
    ranks.barrier()
    return losses


def autotp_losses(placement: Placement, run: Run, rows: MadeRows) -> list[float]:
    """Return the same of the whole model, cut by DeepSpeed's AutoTP."""
    ranks = Ranks(placement, COLLECTIVE_SECONDS)
    import deepspeed

    model = run.plan_model()
    materialise(model, ranks.device, random_values(model, run.model.initializer_range, run.seed))
    config = {
        "train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # 1.0 where nothing is said
        "tensor_parallel": {"autotp_size": placement.world_size},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=run.optim.lr), config=config,
        dist_init_required=False,
    )  # fmt: skip
    assert len(model.model.layers[0].self_attn.q_proj.weight) == 16 // placement.world_size
    losses = []
    for _ in range(2):
        batches = rows.micro_batches(1, 0, 1)
        num_targets = sum(batch.num_targets() for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            loss = engine(*batch.text, batch.targets, 1 / num_targets)
            engine.backward(loss.objective, scale_wrt_gas=False)
            total += loss.sum
        engine.step()
        losses.append(float(total / num_targets))
    ranks.barrier()
    return losses


def test_our_split_under_zero_has_the_losses_of_autotp(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """AutoTP is the second opinion: the first loss, and the one after an update."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    run = tiny_run(
        cache, model=tiny_spec(initializer_range=0.1), optim=SGD(lr=0.5),
        engine=DeepSpeedEngine(stage=3), mesh=MeshSpec(tp=2),
    )  # fmt: skip
    rows = MadeRows(vocab_size=run.model.vocab_size)
    expected = run_ranks(2, autotp_losses, run, rows)[0]
    assert expected[0] - expected[1] > 0.01
    assert run_ranks(2, own_losses, run, rows)[0] == pytest.approx(expected, rel=1e-5, abs=0)


PLAIN = {"_target_": "trainer.engines.deepspeed.DeepSpeedEngine"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, r"engine.stage=4 is unknown; set it to one of \(0, 1, 2, 3\)"),
        ({"stage": 0, "offload_optimizer": True}, r"set engine.stage to 1, 2 or 3"),
        ({"stage": 2, "offload_parameters": True}, r"needs engine.stage=3, found 2"),
        ({"config": {"zero_optimizaton": {}}}, r"zero_optimizaton .* did you mean zero_optimiza"),
        ({"config": {"gradient_clipping": 1.0}}, r"is decided by optim.max_grad_norm"),
        ({"config": {"zero_optimization": {"stage": 3}}}, r"is decided by engine.stage"),
        ({"config": {"zero_optimization": {"offload_param": {}}}}, r"decided by engine.offload_pa"),
        ({"config": {"zero_optimization": 5}}, r"zero_optimization=5 is .*; set it to keys of"),
        ({"config": {"aio": {"blok_size": 1}}}, r"engine.config.aio is no DeepSpeed setting that"),
        ({"config": {"dump_state": "yes"}}, r"dump_state='yes' is .*; set it to true or false"),
        ({"config": {"log_level": "loud"}}, r"log_level='loud' is .*; set it to one of debug, "),
    ],
)
def test_settings_that_deepspeed_would_ignore_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bind({**PLAIN, **settings}, "engine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshSpec(dp_shard=2)}, r"mesh.dp_shard=2 has no effect .* set mesh=ddp"),
        ({"mesh": MeshSpec(pp=2)}, r"mesh.pp=2 is not for engine=deepspeed, .* engine=native"),
        (
            {"mesh": MeshSpec(tp=2), "model": tiny_spec(intermediate_size=33)},
            r"mesh.tp=2 does not divide the 33 features of down_proj; set it to one of \[1, 3",
        ),
        (
            {
                "mesh": MeshSpec(cp=2),
                "model": tiny_spec(num_attention_heads=1, num_key_value_heads=1),
            },
            r"mesh.cp=2 does not divide the 1 attention heads \(o_proj\) of .* \[1\]",
        ),
        ({"precision": "bf16", "engine": DeepSpeedEngine(stage=0)}, r"engine.stage to 1, 2 or 3"),
        ({"precision": "fp64"}, r"trains in precision=fp32 or bf16"),
    ],
)
def test_runs_that_deepspeed_cannot_do_are_refused(
    cache: Path, changes: dict[str, Any], message: str
) -> None:
    run = tiny_run(cache, **{"engine": DeepSpeedEngine(), **changes})
    with pytest.raises(ValueError, match=message):
        run.check(2)


def test_the_same_run_is_accepted_by_both_engines(cache: Path) -> None:
    for engine in (DeepSpeedEngine(), NativeEngine()):
        tiny_run(cache, engine=engine).check(2)


@pytest.mark.parametrize(
    ("group", "given", "message"),
    [
        ("zero_optimization", {"reduce_bucket_sizes": 9}, r"sizes is no .*mean reduce_bucket_size"),
        ("zero_optimization", {"reduce_bucket_size": "auto"}, r"reduce_bucket_size='auto' is refu"),
        (
            "zero_optimization",
            {"leaf_module": {"clases": []}},
            r"leaf_module.clases=\[\] is refuse",
        ),
        ("zero_optimization", {"compute_grad_norm": False}, r"only with ZeRO Stage 1 or 2; change"),
        ("flops_profiler", {"profile_stp": 3}, r"profile_stp is no .*; did you mean profile_step"),
        ("csv_monitor", {"enabled": "perhaps"}, r"csv_monitor.enabled='perhaps' is refused"),
    ],
)
def test_what_deepspeed_would_meet_in_every_worker_is_refused_in_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, group: str, given: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    run = tiny_run(cache, engine=DeepSpeedEngine(stage=3, config={group: given}))
    with pytest.raises(ValueError, match=message) as caught:
        run.check(2)
    assert "\n" not in str(caught.value)
    assert "DS_ACCELERATOR" not in os.environ


def test_settings_that_deepspeed_reads_are_accepted(cache: Path) -> None:
    config = {
        "zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 5000},
        "communication_data_type": "fp32", "gradient_predivide_factor": 1, "steps_per_print": 9,
        "comms_logger": {"enabled": False}, "flops_profiler": {"enabled": False},
    }  # fmt: skip
    tiny_run(cache, engine=DeepSpeedEngine(stage=3, config=config)).check(2)
