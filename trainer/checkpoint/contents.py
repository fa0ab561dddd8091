"""Which weights a checkpoint holds, in which folder and under which names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.files import read_json
from trainer.pieces import Piece

MODEL, BASE = "model", "base.json"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """By default the whole model; else what trains, with the hash of what does not."""

    folder: str = MODEL
    stem: str = "model"
    """Name of the weight file, without its ending."""
    prefix: str = ""
    """Put before every name."""
    names: frozenset[str] | None = None
    """What is saved; None: every weight."""
    base_hash: str | None = None
    """Of the weights that are not saved; None: there are none."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """JSON files that go beside the weights, by name."""

    def of(self, weights: dict[str, Piece]) -> dict[str, Piece]:
        """Return what is saved of the weights, by the names of the file."""
        return {
            f"{self.prefix}{name}": piece
            for name, piece in weights.items()
            if self.names is None or name in self.names
        }

    def check_base(self, step: Path) -> None:
        """Raise ValueError where the step was trained on another base."""
        if self.base_hash is None:
            return
        found = read_json(step / self.folder / BASE)
        if found["xxh3"] != self.base_hash:
            raise ValueError(
                f"{step} was trained on the base {found['weights'] or 'of its seed'}, hash "
                f"{found['xxh3']}; this one has {self.base_hash}; give that base, or start anew "
                "with resume=never"
            )
