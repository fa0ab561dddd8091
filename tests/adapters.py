"""Folders with an adapter, as peft leaves them; and runs that die and go on."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.nn.init import Init, initial_values
from tests.ranks import run_ranks
from tests.runs import DieAt, train
from trainer.adapters.files import CONFIG, WEIGHTS, names_in_file
from trainer.checkpoint.commit import committed_steps, step_folder
from trainer.files import write_json
from trainer.record import read_lines
from trainer.run import Run
from trainer.verify.forked import RankFailedError


@contextmanager
def peft_package() -> Iterator[Any]:
    """Yield peft, or skip; what it says of a key that is missing or unknown is an error."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # peft 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield peft


def write_adapter(folder: Path, run: Run) -> Path:
    """Write an adapter of the run's kind with random numbers; it fits the run's model."""
    model = run.trained_model()
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, in_file in names_in_file(model, trained).items():
        noise = initial_values(name, Init(std=0.2), 3, 0, trained[name].numel())
        tensors[in_file] = noise.view(trained[name].shape)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = run.adapter.peft_config(model)
    assert config is not None
    write_json(folder / CONFIG, config)
    return folder


def adapter_in(folder: Path, step: int = 3) -> Path:
    return step_folder(folder / "checkpoints", step) / "adapter"


def check_resume(folder: Path, run: Run, on_two_ranks: Run) -> None:
    """Train six steps at once, and with a death after the fourth: on one rank to the same bits.

    `on_two_ranks` is the run as it goes on there, to losses within 1e-5.
    """
    run, on_two_ranks = (replace(r, max_steps=6, save_every=3) for r in (run, on_two_ranks))
    run_ranks(1, train, folder / "whole", run)
    with pytest.raises(RankFailedError):
        run_ranks(1, train, folder / "cut", replace(run, callbacks={"die": DieAt(4)}))
    assert committed_steps(folder / "cut" / "checkpoints") == [3]
    shutil.copytree(folder / "cut", folder / "other")
    run_ranks(1, train, folder / "cut", run)
    run_ranks(2, train, folder / "other", on_two_ranks)
    losses = {
        name: [line["loss"] for line in read_lines(folder / name / "metrics.jsonl")]
        for name in ("whole", "cut", "other")
    }
    assert len(losses["whole"]) == 6
    assert losses["cut"] == losses["whole"]
    assert losses["other"] == pytest.approx(losses["whole"], rel=1e-5)
    expected = load_file(adapter_in(folder / "whole", 6) / WEIGHTS)
    for name, tensor in load_file(adapter_in(folder / "cut", 6) / WEIGHTS).items():
        assert torch.equal(tensor, expected[name]), name
