"""Which weights a checkpoint holds, in which folder and under which names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from models.nn.decoupled import new_rows
from trainer.files import read_json
from trainer.pieces import Piece

MODEL, TRAINED, AUTO = CHOICES = ("model", "trained", "auto")
BASE = "base.json"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """By default the whole model; else what trains, with the hash of what does not."""

    folder: str = MODEL
    stem: str = "model"
    """Name of the weight file, without its ending."""
    names: dict[str, str] | None = None
    """Names in the file of what is saved; None: every weight, under its own."""
    base_hash: str | None = None
    """Of the weights that are not saved; None: there are none."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """JSON files that go beside the weights, by name."""

    def of(self, weights: dict[str, Piece]) -> dict[str, Piece]:
        """Return what is saved of the weights, by the names of the file."""
        if self.names is None:
            return weights
        return {self.names[n]: piece for n, piece in weights.items() if n in self.names}

    def check_base(self, step: Path) -> None:
        """Raise ValueError where the step was trained on another base."""
        if self.base_hash is None:
            return
        if not (step / self.folder / BASE).is_file():
            raise ValueError(
                f"{step} holds no {self.folder}/: it was saved with other contents; set "
                "checkpoint.contents as it was then, or start anew with resume=never"
            )
        found = read_json(step / self.folder / BASE)
        if found["xxh3"] != self.base_hash:
            raise ValueError(
                f"{step} was trained on the base {found['weights'] or 'of its seed'}, hash "
                f"{found['xxh3']}; this one has {self.base_hash}; give that base, or start anew "
                "with resume=never"
            )


def is_trained_alone(setting: str, *, new_tokens: bool) -> bool:
    """Whether checkpoint.contents comes to what trains alone, where there is no adapter."""
    return setting == TRAINED or (setting == AUTO and new_tokens)


def check_contents(model: nn.Module, setting: str, *, new_tokens: bool, has_adapter: bool) -> None:
    """Raise ValueError where checkpoints of the planned model cannot hold what `setting` says."""
    key = f"checkpoint.contents={setting}"
    if has_adapter and setting != AUTO:
        raise ValueError(
            f"{key} has no effect with an adapter, which is saved without its base; set it to auto"
        )
    if setting == TRAINED and all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{key} and everything trains; set it to model, or freeze something")
    is_whole = not has_adapter and not is_trained_alone(setting, new_tokens=new_tokens)
    if is_whole and new_rows(model):
        raise ValueError(
            f"model.additional_tokens with {key} would leave model folders that transformers "
            "cannot read; set freeze=new_tokens, adapter=lora or checkpoint.contents=trained"
        )
