"""What is done about a spike is the same on every layout and engine, and resumes to the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_wrong_numbers import FOUND, flags_of, losses, weights_of
from tests.faults.wrong_numbers import NonsenseData
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.engines.deepspeed_state import import_deepspeed
from trainer.engines.native import NativeEngine
from trainer.files import read_lines
from trainer.mesh import MeshSpec
from trainer.numerics.spike import SpikeSpec
from trainer.optim import AdamW
from trainer.points import METRICS
from trainer.run import Run

import_deepspeed("cpu")  # once, not in every rank
STEPS, AT = 24, 21
CLIP = SpikeSpec(policy="clip", **FOUND)
DDP, FSDP = MeshSpec(dp_replicate=2), MeshSpec(dp_shard=2)
MANY: list[Any] = [
    pytest.param(NativeEngine(), DDP, id="ddp"),
    pytest.param(NativeEngine(), FSDP, id="fsdp"),
    pytest.param(NativeEngine(), MeshSpec(pp=2), id="pp"),
    pytest.param(NativeEngine(offload_optimizer=True), DDP, id="offload", marks=pytest.mark.slow),
    pytest.param(AccelerateEngine(), DDP, id="accelerate", marks=pytest.mark.slow),
    *(
        pytest.param(DeepSpeedEngine(stage=n), DDP, id=f"zero {n}", marks=pytest.mark.slow)
        for n in (0, 1, 3)
    ),
    pytest.param(DeepSpeedEngine(stage=2), DDP, id="zero 2"),
]


def spiked(cache: Path, spike: SpikeSpec, **changes: Any) -> Run:
    """Return a run with nonsense at step 21; no gradient is clipped but as `spike` says."""
    optim = AdamW(lr=1e-2, max_grad_norm=None)
    run = tiny_run(cache, data_micro_rows=1, spike=spike, max_steps=STEPS, optim=optim, **changes)
    nonsense = range((AT - 1) * 8, AT * 8)
    return replace(run, data=NonsenseData(**vars(run.data), nonsense=nonsense))


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_lines(folder / METRICS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """Runs of one process, by policy; off is what happens to them without."""
    folder = tmp_path_factory.mktemp("alone")
    for spike in (CLIP, replace(CLIP, policy="skip"), SpikeSpec()):
        run_ranks(1, train, folder / spike.policy, spiked(cache, spike))
    return {policy: folder / policy for policy in ("clip", "skip", "off")}


@pytest.mark.parametrize("policy", ["clip", "skip"])
@pytest.mark.parametrize(("engine", "mesh"), MANY)
def test_every_layout_does_the_same_about_a_spike(
    tmp_path: Path, cache: Path, alone: dict[str, Path], engine: Any, mesh: MeshSpec, policy: str
) -> None:
    run = spiked(cache, replace(CLIP, policy=policy), engine=engine, mesh=mesh)
    run_ranks(2, train, tmp_path, run)
    assert flags_of(tmp_path) == {AT: ["loss_spike", "gradient_spike"]}
    for name in ("loss", "grad_norm"):
        expected = column(alone[policy], name)
        assert len(expected) == STEPS
        assert column(tmp_path, name) == pytest.approx(expected, rel=2e-4)
        # What was done can be seen: this is no test of nothing.
        assert column(alone["off"], name)[AT:] != pytest.approx(expected[AT:], rel=2e-3)


def test_until_a_spike_nothing_differs_from_a_run_that_looks_for_none(
    alone: dict[str, Path],
) -> None:
    for policy in ("clip", "skip"):
        for name in ("loss", "grad_norm"):
            assert column(alone[policy], name)[:AT] == column(alone["off"], name)[:AT]


@pytest.mark.parametrize("saved_at", [4, 20])
def test_a_run_resumed_in_the_warmup_or_behind_it_goes_on_bit_by_bit(
    tmp_path: Path, cache: Path, alone: dict[str, Path], saved_at: int
) -> None:
    run = spiked(cache, CLIP)
    run_ranks(1, train, tmp_path, replace(run, max_steps=saved_at))
    run_ranks(1, train, tmp_path, run)
    assert losses(tmp_path) == losses(alone["clip"])
    assert weights_of(tmp_path) == weights_of(alone["clip"])
