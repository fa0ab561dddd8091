"""`deterministic=run`: stopped and resumed anywhere, a run has the bits of one that never was."""

import logging
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.determinism import VARIABLES, hold
from tests.conftest import Figure, tiny_spec
from tests.distributed.test_topology_free import outcome
from tests.ranks import run_ranks
from tests.runs import start_in, tiny_run, train
from trainer.construct import fit
from trainer.determinism import check_bits
from trainer.distributed import Placement
from trainer.engines.accelerate import AccelerateEngine
from trainer.engines.deepspeed import DeepSpeedEngine
from trainer.mesh import MeshSpec
from trainer.run import Run
from trainer.verify.forked import RankFailedError

RANKS, STEPS = 3, 12
LAYOUTS = {"ddp": MeshSpec(dp_replicate=-1), "fsdp": MeshSpec(dp_shard=-1)}


def repeatable(cache: Path, **changes: Any) -> Run:
    """Three ranks: with two, a sum has one order only."""
    settings = {
        "deterministic": "run", "model": tiny_spec(attention_dropout=0.1), "max_steps": STEPS,
        "save_every": 2, "data_global_rows": 12, "data_micro_rows": 2,
    }  # fmt: skip
    return tiny_run(cache, **(settings | changes))


def train_and_die(placement: Placement, folder: Path, run: Run, step: int) -> None:
    """Train one rank, which leaves as after kill -9 once it begins step `step`."""
    start = start_in(folder, placement)
    enter = start.whereabouts.enter

    def watched(section: str, number: int | None = None, *rest: Any) -> None:
        if section == "train_step" and number == step:
            os._exit(9)
        enter(section, number, *rest)

    start.whereabouts.enter = watched  # type: ignore[method-assign]
    fit(run, start)


def interrupted(folder: Path, run: Run, kills: list[int]) -> tuple[list[Any], list[bytes]]:
    for step in kills:
        with pytest.raises(RankFailedError, match="died without a result"):
            run_ranks(RANKS, train_and_die, folder, run, step)
    run_ranks(RANKS, train, folder, run)
    assert len(list((folder / "attempts").iterdir())) == len(kills) + 1
    return outcome(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twice_killed_it_has_the_bits_of_a_run_that_never_was(
    tmp_path: Path, cache: Path, layout: str
) -> None:
    run = repeatable(cache, mesh=LAYOUTS[layout])
    assert interrupted(tmp_path / "killed", run, [4, 9]) == interrupted(tmp_path / "whole", run, [])


def test_without_it_a_step_after_a_restart_has_other_bits(tmp_path: Path, cache: Path) -> None:
    """Else the two do the same: so it is the sums' order alone."""
    run = repeatable(cache, deterministic="off")
    whole = interrupted(tmp_path / "whole", run, [])
    assert interrupted(tmp_path / "killed", run, [9]) != whole
    numbers, _ = interrupted(tmp_path / "run", repeatable(cache), [])
    losses = [[line["loss"] for line in lines] for lines in (numbers, whole[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_ten_random_steps_it_has_the_same_bits(
    tmp_path: Path, cache: Path, layout: str, figure: Figure
) -> None:
    run = repeatable(cache, mesh=LAYOUTS[layout], max_steps=60)
    kills = sorted(random.Random(42).sample(range(2, 60), 10))
    whole = interrupted(tmp_path / "whole", run, [])
    assert interrupted(tmp_path / "again", run, []) == whole
    assert interrupted(tmp_path / "killed", run, kills) == whole
    figure(f"A15 restarts with the bits of a whole run, {layout}", len(kills), "of 10, on 3 ranks")


BITS = {"torch": "2.13.0", "threads": 2, "ranks": 3, "mesh": "dp_replicate 3"}


@pytest.mark.parametrize(
    ("mode", "name", "value", "is_refused"),
    [
        ("run", "torch", "2.12.0", True),
        ("run", "threads", 1, True),
        ("run", "mesh", "dp_shard 3", True),
        ("topology_free", "torch", "2.12.0", True),
        ("topology_free", "ranks", 1, False),
        ("topology_free", "threads", 1, False),
        ("off", "torch", "2.12.0", False),
    ],
)
def test_what_decides_the_bits_must_be_as_it_was(
    cache: Path, mode: str, name: str, value: Any, is_refused: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = repeatable(cache, deterministic=mode)
    check_bits(run, 4, None, BITS)  # a checkpoint of version 0.1
    check_bits(run, 4, BITS, BITS)
    if not is_refused:
        check_bits(run, 4, BITS, BITS | {name: value})
        return
    message = (
        f"deterministic={mode}: {name} was {BITS[name]} when step 4 was saved and is {value} now, "
        "which gives other bits; start as it was then, or go on with other bits: "
        r"resume_allow=\[deterministic\]"
    )
    with pytest.raises(ValueError, match=message):
        check_bits(run, 4, BITS, BITS | {name: value})
    with caplog.at_level(logging.WARNING):
        allowed = replace(run, resume_allow=["deterministic"])
        check_bits(allowed, 4, BITS, BITS | {name: value})
    assert "other bits from here on" in caplog.text


def test_a_resumed_run_on_other_ranks_is_refused(tmp_path: Path, cache: Path) -> None:
    run = repeatable(cache, max_steps=2)
    run_ranks(2, train, tmp_path, run)
    with pytest.raises(RankFailedError, match="ranks was 2 when step 2 was saved and is 1 now"):
        run_ranks(1, train, tmp_path, replace(run, max_steps=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": DeepSpeedEngine()}, r"needs sums over ranks in one order.*set engine=native"),
        ({"engine": AccelerateEngine()}, r"needs sums over ranks in one order.*set engine=native"),
        ({"mesh": MeshSpec(pp=2, dp_replicate=2)}, r"copies of pipelines.*mesh\.pp=1, or"),
    ],
)
def test_what_cannot_be_repeated_is_refused(
    cache: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        repeatable(cache, data_micro_rows=1, **changes).check(4)


def test_the_environment_is_set_before_any_library_reads_it() -> None:
    environ: dict[str, str] = {}
    hold("off", environ)
    hold("topology_free", environ)
    assert environ == {}
    hold("run", environ)
    assert environ == {name: values[0] for name, values in VARIABLES.items()}
    hold("run", environ)  # as a worker finds it
    for name in VARIABLES:
        with pytest.raises(ValueError, match=f"{name}=other is set, and deterministic=run needs"):
            hold("run", environ | {name: "other"})


def test_the_environment_comes_too_late_for_a_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="needs NCCL_ALGO before the GPU is used"):
        hold("run", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
