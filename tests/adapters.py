"""Folders with an adapter, as peft leaves them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from models.nn.init import Init, initial_values
from trainer.adapters.files import CONFIG, PREFIX, WEIGHTS
from trainer.files import write_json
from trainer.run import Run


def write_adapter(folder: Path, run: Run) -> Path:
    """Write an adapter of the run's kind with random numbers; it fits the run's model."""
    model = run.trained_model()
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = initial_values(name, Init(std=0.2), 3, 0, parameter.numel())
            tensors[PREFIX + name] = noise.view(parameter.shape)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = run.adapter.peft_config(model)
    assert config is not None
    write_json(folder / CONFIG, config)
    return folder
