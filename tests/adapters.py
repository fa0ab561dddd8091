"""Folders with an adapter, as peft leaves them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.nn.init import Init, initial_values
from trainer.adapters.files import CONFIG, WEIGHTS, names_in_file
from trainer.files import write_json
from trainer.run import Run


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
