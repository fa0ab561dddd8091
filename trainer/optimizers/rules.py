"""Which weights are updated otherwise than the rest, and torch's groups of them."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainer.optimizers.matrices import Stacked
from trainer.pieces import Piece, is_vector


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which weights are updated otherwise than the rest.

    Names are whole ones; those that begin with a dot are endings of names.
    """

    no_decay: tuple[str, ...] = ()
    """Whole names or any endings of matrices that weight decay spares."""
    lr_ratios: dict[str, float] = field(default_factory=dict)
    """Learning rates over that of the optimizer."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """In place of that of the optimizer."""
    unfrozen_at: dict[str, int] = field(default_factory=dict)
    """After how many steps a weight began to train, where not at the start."""
    matrices: dict[str, Stacked] = field(default_factory=dict)
    """Weights of the blocks that are matrices."""

    def lr_ratio(self, name: str) -> float:
        """Return the first ratio that fits, else 1."""
        return next((ratio for key, ratio in self.lr_ratios.items() if _is_of(name, key)), 1.0)

    def decays(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether weight decay acts on a weight: by the shape of the *whole* tensor, since a
        shard's own does not say what it is."""
        return not is_vector(shape) and not name.endswith(self.no_decay)

    def weight_decay(self, name: str, piece: Piece, usual: float) -> float:
        found = (decay for key, decay in self.weight_decays.items() if _is_of(name, key))
        return next(found, usual) if self.decays(name, piece.shape) else 0.0


def _is_of(name: str, key: str) -> bool:
    return name == key or (key.startswith(".") and name.endswith(key))


def groups_of(
    lr: float, weight_decay: float, pieces: dict[str, Piece], rules: Rules
) -> list[dict[str, Any]]:
    """Split by how weights are updated: torch's groups."""
    groups: dict[tuple[float, float, int], list[Tensor]] = {}
    for name, piece in pieces.items():
        key = (
            lr * rules.lr_ratio(name),
            rules.weight_decay(name, piece, weight_decay),
            rules.unfrozen_at.get(name, 0),
        )
        groups.setdefault(key, []).append(piece.local)
    return [
        {"params": tensors, "lr": lr, "weight_decay": decay}
        for (lr, decay, _), tensors in sorted(groups.items(), key=lambda item: item[0])
    ]
