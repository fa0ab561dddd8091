"""Where a run went back, and which samples it passed over since: RUN/rewinds.json.

The checkpoint that a run goes back to was made before the decision, and is never written again. So
what was decided lies beside the checkpoints, by the step of the one it belongs to.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import read_json, write_json

if TYPE_CHECKING:
    from trainer.distributed import Ranks

REWINDS = "rewinds.json"


@dataclass(frozen=True, kw_only=True)
class Rewound:
    """How a run goes on from one checkpoint."""

    first: int
    """The global sample that would have followed."""
    last: int
    """The one that follows instead."""
    spikes: tuple[int, ...]
    """Steps at which it went back, in their order."""
    mix: dict[str, Any] | None = None
    """The mixtures of the run so far, if it had several: one may have begun behind the checkpoint,
    and the samples behind it keep their order."""


Rewinds = dict[int, Rewound]
"""By the step of the checkpoint."""


def read_rewinds(folder: Path) -> Rewinds:
    """Return those of a run; none where it never went back."""
    path = folder / REWINDS
    if not path.exists():
        return {}
    return _read(read_json(path))


def rewinds_of(folder: Path, ranks: "Ranks") -> Rewinds:
    """Return those of a run as rank 0 sees them. Collective."""
    found = _plain(read_rewinds(folder)) if ranks.placement.is_main else {}
    return _read(json.loads(ranks.broadcast_text(json.dumps(found))))


def kept(rewinds: Rewinds, step: int) -> Rewinds:
    """Return those that still hold for a run that goes on after `step`: later ones are no part of
    its history any more."""
    return {at: one for at, one in rewinds.items() if at <= step}


def with_another(rewinds: Rewinds, step: int, new: Rewound) -> Rewinds:
    """Return them with one more; one to the same step before it is told by its spikes."""
    if step in rewinds:
        new = replace(new, spikes=(*rewinds[step].spikes, *new.spikes))
    return {**kept(rewinds, step), step: new}


def write_rewinds(folder: Path, rewinds: Rewinds) -> None:
    write_json(folder / REWINDS, _plain(rewinds))


def _plain(rewinds: Rewinds) -> dict[str, Any]:
    return {str(step): asdict(one) for step, one in rewinds.items()}


def _read(found: dict[str, Any]) -> Rewinds:
    return {
        int(step): Rewound(**one | {"spikes": tuple(one["spikes"])}) for step, one in found.items()
    }
