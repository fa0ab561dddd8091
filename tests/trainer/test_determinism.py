"""What `deterministic=run` tells torch costs no kernel that changes nothing."""

from pathlib import Path

import torch

from tests.distributed.test_layouts import curve
from tests.ranks import run_ranks
from tests.runs import tiny_run, train
from trainer import construct
from trainer.distributed import Placement
from trainer.run import Run


def train_filling(placement: Placement, folder: Path, run: Run, *, fills: bool) -> bool:
    """Train with memory filled by NaN before it is written, or as it is; return which it was."""
    fix_bits = construct.fix_bits

    def fixed(settings: Run) -> None:
        fix_bits(settings)
        if fills:
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

    construct.fix_bits = fixed  # type: ignore[assignment]
    train(placement, folder, run)
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def train_as_it_is(placement: Placement, folder: Path, run: Run) -> bool:
    return train_filling(placement, folder, run, fills=False)


def train_filled(placement: Placement, folder: Path, run: Run) -> bool:
    return train_filling(placement, folder, run, fills=True)


def test_memory_that_is_not_written_yet_is_not_read(tmp_path: Path, cache: Path) -> None:
    run = tiny_run(cache, deterministic="run", precision="bf16", max_steps=4)
    assert run_ranks(2, train_as_it_is, tmp_path / "plain", run) == [False, False]
    assert run_ranks(2, train_filled, tmp_path / "filled", run) == [True, True]
    for key in ("loss", "grad_norm"):
        assert curve(tmp_path / "plain", key) == curve(tmp_path / "filled", key)
